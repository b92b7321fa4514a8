"""How much sooner a later round of a ChatGLM3 conversation begins to answer because the KV cache is kept.

    python benchmarks/kept_cache.py [--size chatglm3-6b-int4] [--history 2000] [--question 30]

Random weights: speed does not depend on them. Each time is that of reading a prompt up to the first logits:
the same prompt fresh, and with all but the newest question read before. Promised: 10 times sooner.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from glmui.bench import random_model  # noqa: E402
from glmui.engine.chatglm import open_chatglm  # noqa: E402
from glmui.engine.decoders import ChatGLM2Decoder  # noqa: E402
from glmui.glm.chatglm2 import ChatGLM2Model  # noqa: E402
from glmui.text.chatglm2 import GMASK, SOP  # noqa: E402
from glmui.types import EngineSpec  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="chatglm3-6b-int4")
    parser.add_argument("--history", type=int, default=2000)
    parser.add_argument("--question", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    wish = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        random_model.write(Path(folder), wish.size)
        speaker = open_chatglm(EngineSpec(wish.size, folder, device="cpu"), lambda progress: None).speaker
        assert speaker is not None
        assert isinstance(speaker.decoder, ChatGLM2Decoder), "only ChatGLM2 and 3 can keep a cache"
        fresh, kept = measure(speaker.decoder.model, wish.history, wish.question, wish.rounds)
    print(f"fresh prefill of {wish.history + wish.question} tokens: {fresh:.2f} s")
    print(f"kept cache, {wish.question} new tokens: {kept:.2f} s, {fresh / kept:.1f} times sooner")


def measure(model: ChatGLM2Model, history: int, question: int, rounds: int) -> tuple[float, float]:
    """Median seconds of a fresh prefill and of one that finds the history in its cache."""
    drawn = random.Random(0)
    fresh, kept = [], []
    for _ in range(rounds):
        said = [GMASK, SOP, *drawn.choices(range(300, 60000), k=history - 2)]
        asked = [*said, *drawn.choices(range(300, 60000), k=question)]
        fresh.append(seconds(ChatGLM2Decoder(model), asked))
        decoder = ChatGLM2Decoder(model)
        seconds(decoder, said)
        kept.append(seconds(decoder, asked))
    return statistics.median(fresh), statistics.median(kept)


@torch.inference_mode()
def seconds(decoder: ChatGLM2Decoder, ids: list[int]) -> float:
    began = time.perf_counter()
    int(decoder.prefill(ids, lambda part: None).argmax())
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
