"""What picking the next id takes of a token's time on a CPU, and what each part of it does.

python benchmarks/sampling.py [--vocabulary 130528] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the engine process

import torch  # noqa: E402

from glmui.engine.sampling import Sampler, all_finite, draw, keep_top_k, keep_top_p, make_generator  # noqa: E402
from glmui.types import GenerationParams  # noqa: E402


def milliseconds(work: Callable[[], object], runs: int = 60) -> float:
    """The median of several calls."""
    taken = []
    for _ in range(runs + 1):  # the first one warms up
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:]) * 1e3


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--vocabulary", type=int, default=130528)
    asked.add_argument("--threads", type=int, default=2)
    options = asked.parse_args()
    torch.set_num_threads(options.threads)
    params, generator = GenerationParams(), make_generator(1, "cpu")
    logits = 3 * torch.randn(1, options.vocabulary)
    few = keep_top_k(logits, params.top_k)
    sampler = Sampler(params, generator)
    parts: dict[str, Callable[[], object]] = {
        "the whole": lambda: sampler(logits, [[1]]),
        "is it finite": lambda: bool(all_finite(logits)),
        "top-k": lambda: keep_top_k(logits, params.top_k),
        "top-p after top-k": lambda: keep_top_p(few, params.top_p),
        "top-p alone": lambda: keep_top_p(logits, params.top_p),
        "the draw": lambda: draw(few.softmax(-1), generator),
    }
    for name, work in parts.items():
        print(f"{name:20}{milliseconds(work):6.2f} ms")


if __name__ == "__main__":
    main()
