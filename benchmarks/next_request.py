"""How long after its end the engine answers again: killed in mid-reply, or out of memory.

    python benchmarks/next_request.py [--size chatglm-6b-int4] [--device cpu] [--tries 3] [--work DIR]

Real engine processes with random weights of full size (4 GB, and as much for the packed ones), Linux only. An
end is a SIGKILL from outside, or a limit on the process's address space (RLIMIT_AS), at which torch is really
refused memory. `kept` tells whether packed weights lay in their file: without, they cannot be kept at all
where it is a SIGKILL; where memory ran out they are gone by then, as if a card's model went to the CPU. One
JSON object for each try: the seconds from the end, as the reader learns of it, to the next answer's first
token; `waited` is the longest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from glmui.bench import random_model  # noqa: E402
from glmui.engine.client import EngineClient  # noqa: E402
from glmui.errors import GlmuiError  # noqa: E402
from glmui.types import EngineSpec, GenerationParams, Message  # noqa: E402

QUESTION = [Message("user", " ".join(map(str, range(100, 150))))]  # a token each in a random_model
LONG = GenerationParams(max_length=2048, max_new_tokens=1024, temperature=1)
SHORT = GenerationParams(max_length=2048, max_new_tokens=2, temperature=1)
SPARE = 8 << 20  # bytes of address space that a process at its limit has left


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def refuse_memory(pid: int) -> None:
    """No more than this process has; its cache has to grow before the reply ends."""
    process = psutil.Process(pid)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + SPARE,) * 2)


ENDS: dict[str, Callable[[int], None]] = {"killed": kill, "out of memory": refuse_memory}


def one(spec: EngineSpec, end: Callable[[int], None], kept: bool, number: int) -> dict[str, Any]:
    """A first reply, one that is ended, and the next."""
    client = EngineClient(spec, idle_seconds=0)
    try:
        first_token(client, f"first {number}")
        if not kept and spec.packed_dir:
            shutil.rmtree(spec.packed_dir)
        code, tokens = ended(client, end, f"ended {number}")
        seconds = first_token(client, f"next {number}")
        return {"seconds": round(seconds, 2), "said": code, "tokens_kept": tokens}
    finally:
        client.close()


def first_token(client: EngineClient, request: str) -> float:
    """Seconds until a question's first token."""
    began, first = time.perf_counter(), 0.0
    for chunk in client.stream_chat(QUESTION, SHORT, request):
        if chunk.tokens and not first:
            first = time.perf_counter() - began
    return first


def ended(client: EngineClient, end: Callable[[int], None], request: str) -> tuple[str, int]:
    """What was said of a reply that was ended, and how many tokens it had."""
    tokens, going = 0, True
    try:
        for chunk in client.stream_chat(QUESTION, LONG, request):
            tokens = max(tokens, chunk.tokens)
            pid = client.info().pid
            if going and tokens >= 8 and pid:
                end(pid)
                going = False
    except GlmuiError as error:
        return error.code, tokens
    return "nothing", tokens


def run(options: argparse.Namespace, work: Path) -> None:
    model = work / "model"
    model.mkdir(parents=True, exist_ok=True)
    if not (model / "config.json").is_file():
        random_model.write(model, options.size)
    for kept in (True, False):
        for name, end in ENDS.items():
            found = []
            for number in range(options.tries):
                spec = EngineSpec(
                    "random",
                    str(model),
                    options.device,
                    packed_dir=str(work / "packed") if kept or end is refuse_memory else "",
                    kernel_dir=str(work / "kernels"),
                    stop_repetition=False,
                )
                found.append(one(spec, end, kept, number))
                print(json.dumps({"end": name, "kept": kept, **found[-1]}), flush=True)
            print(json.dumps({"end": name, "kept": kept, "waited": max(f["seconds"] for f in found)}))


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--size", default="chatglm-6b-int4", choices=random_model.SIZES)
    asked.add_argument("--device", default="cpu")
    asked.add_argument("--tries", type=int, default=3)
    asked.add_argument("--work", type=Path, help="a folder to keep the weights in, for another run")
    options = asked.parse_args()
    if options.work:
        run(options, options.work)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(options, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
