"""Everything that only a card can tell, in one command; docs/performance.md names the goals.

    python benchmarks/card.py [--size chatglm-6b-int4] [--only kernels,bench,cap,rounds,memory,profile]

Needs torch with CUDA, psutil, safetensors and sentencepiece; downloads nothing. Random weights of full size
are written to a temporary folder (4 GB). Each part is one JSON object on one line, printed as soon as it is
known, so that a run cut short has told what it found. Parts run in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from glmui import prompts  # noqa: E402
from glmui.bench import random_model  # noqa: E402
from glmui.bench.card_subject import copy_gb_s  # noqa: E402
from glmui.bench.figures import decode_rate  # noqa: E402
from glmui.bench.measure import subject_of  # noqa: E402
from glmui.engine.card_step import record  # noqa: E402
from glmui.engine.client import EngineClient  # noqa: E402
from glmui.engine.families import open_family  # noqa: E402
from glmui.errors import EngineError  # noqa: E402
from glmui.memory.plan_request import GIB  # noqa: E402
from glmui.quant.kernels import cuda  # noqa: E402
from glmui.quant.kernels.cuda import CardKernels  # noqa: E402
from glmui.quant.packing import dequantize_weight, quantize_weight  # noqa: E402
from glmui.text import open_counter  # noqa: E402
from glmui.tools.measuring import take  # noqa: E402
from glmui.types import EngineSpec, GenerationParams, Message  # noqa: E402

DEVICE = "cuda:0"
SHAPES = ((12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384), (130528, 4096))  # rows, columns
COLD = 256 << 20  # bytes: more than any card's L2 cache
CAPPED = (
    *("peak_vram_gb", "peak_above_weights_and_cache_gb", "weights_vram_gb", "cache_vram_gb"),
    *("cuda_context_gb", "decode_tok_s"),
)
EARLIER, ROUNDS, CRASHES = 12, 40, 20
STEPS = 32
QUESTION = " ".join(map(str, range(100, 300)))  # a token each in a vocabulary of random_model


def kernels(folder: Path) -> Iterator[dict[str, Any]]:
    """Each shape of ChatGLM-6B by each number of rows: how fast its weights are read, and how exactly."""
    loaded = cuda.load(DEVICE, folder / "kernels")
    yield {"kernels": loaded.name, "reason": loaded.reason, "copy_gb_s": round(copy_gb_s(DEVICE), 1)}
    if loaded.kernels is None:
        return
    for bits in (4, 8):
        for rows, columns in SHAPES:
            yield from shaped(loaded.kernels, bits, rows, columns)


def shaped(kernels: CardKernels, bits: int, rows: int, columns: int) -> Iterator[dict[str, Any]]:
    """One shape. Its weights lie there so often that none is in the L2 cache when its turn comes."""
    random = torch.randn(rows, columns, device=DEVICE, dtype=torch.float16).div_(50)
    weight, scale = quantize_weight(random, bits)
    del random
    nbytes = weight.numel() + 2 * rows
    weights = [weight, *(weight.clone() for _ in range(COLD // nbytes))]
    dense = dequantize_weight(weight, scale, bits, columns, torch.float16)
    shape = {"bits": bits, "rows": rows, "columns": columns}
    for count in (1, 2, 4, 8):
        x = torch.randn(count, columns, device=DEVICE).half()
        seconds = timed([partial(kernels.linear, x, each, scale, bits) for each in weights])
        wanted = x.float() @ dense.float().T
        error = (kernels.linear(x, weight, scale, bits).float() - wanted).norm() / wanted.norm()
        speed = {"us": round(seconds * 1e6, 1), "gb_s": round(nbytes / seconds / 1e9, 1)}
        yield {**shape, "x": count, **speed, "error": round(error.item(), 6)}
    seconds = timed([partial(kernels.widen, each, scale, bits, dense) for each in weights])
    yield {**shape, "widen_gb_s": round((nbytes + dense.nbytes) / seconds / 1e9, 1)}


def timed(works: Sequence[Callable[[], Any]], runs: int = 20) -> float:
    """Seconds of one of these calls, which follow each other in a CUDA graph: the median of several runs."""

    def all_of_them() -> Any:
        return [work() for work in works][-1]

    graph, _ = record(all_of_them, torch.device(DEVICE))
    seconds: list[float] = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # while it runs the next one is queued, so that no wait for Python is counted
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / len(works))
    graph.reset()
    return sorted(seconds)[runs // 2]


def bench(folder: Path) -> Iterator[dict[str, Any]]:
    """The figures of `glmui bench --device cuda`."""
    yield take(spec_for(folder), lambda key, **values: None).as_json()


def cap(folder: Path) -> Iterator[dict[str, Any]]:
    """The same as if the card had 6 GiB: with default settings, and with all that makes it smaller."""
    small = replace(spec_for(folder), vram_cap=6 * GIB)
    for name, spec in {"default": small, "smallest": replace(small, head_bits=8, kv_cache="int8")}.items():
        figures = take(spec, lambda key, **values: None).as_json()
        yield {name: {key: figures[key] for key in CAPPED}}


def rounds(folder: Path) -> Iterator[dict[str, Any]]:
    """A conversation at the limit of its context: VRAM must not grow after the third round."""
    engine, count = open_family(spec_for(folder), lambda progress: None), open_counter(folder)
    params = GenerationParams(max_new_tokens=16)
    said: list[Message] = []
    for number in range(EARLIER):  # more than the context holds, so that every round is at its limit
        said += [Message("user", f"{number}. {QUESTION}"), Message("assistant", "。")]
    held, reserved, prompt_tokens = [], [], []
    for number in range(ROUNDS):
        said.append(Message("user", f"{number}. {QUESTION}"))
        prompt = prompts.fit(said, count, params.max_length - 64, hard_limit=params.max_length - 1)
        chunks = list(engine.stream_chat(prompt.messages, params, str(number)))
        said.append(Message("assistant", "".join(chunk.text for chunk in chunks) or "。"))
        prompt_tokens.append(chunks[-1].usage.prompt_tokens if chunks[-1].usage else 0)
        held.append(torch.cuda.max_memory_allocated())
        reserved.append(torch.cuda.memory_reserved())
    yield {
        "rounds": ROUNDS,
        "prompt_tokens": prompt_tokens[-1],
        "peak_gb": round(held[-1] / 1e9, 3),
        "growth_mb_after_round_3": round((held[-1] - held[2]) / 1e6, 2),
        "reserved_growth_mb_after_round_3": round((reserved[-1] - reserved[2]) / 1e6, 2),
    }


def memory(folder: Path) -> Iterator[dict[str, Any]]:
    """A card that is too small for what is asked, twenty times; then one that is not."""
    small = replace(spec_for(folder), device=DEVICE, vram_cap=4 * GIB)
    client, params = EngineClient(small, idle_seconds=0), GenerationParams(max_new_tokens=4)
    try:
        for number in range(CRASHES):
            client.unload()  # what was lowered is forgotten
            yield {"try": number, **asked(client, params, str(number))}
        client.configure(spec_for(folder))
        yield {"after": asked(client, params, "after")}
    finally:
        client.close()


def asked(client: EngineClient, params: GenerationParams, request: str) -> dict[str, Any]:
    """One short answer, how long it took, and what was said of it."""
    began = time.perf_counter()
    try:
        last = list(client.stream_chat([Message("user", QUESTION)], params, request))[-1]
        ended = {"ended": last.finish_reason, "note": last.note}
    except EngineError as error:
        ended = {"ended": error.code}
    return {"seconds": round(time.perf_counter() - began, 2), **ended, "device": client.info().device}


def profile(folder: Path) -> Iterator[dict[str, Any]]:
    """Where a token's time goes: the kernels of some steps, and how much of the time none runs.

    The time is taken without the profiler, which itself takes seconds to begin and to end.
    """
    engine = open_family(spec_for(folder), lambda progress: None)
    row = subject_of(engine).at(128, 1)
    rate = decode_rate(row)
    row.reset()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(STEPS):
            row.step()
    spent = sorted(seen.key_averages(), key=lambda event: -event.device_time_total)
    yield {
        "ms_per_token": round(1e3 / rate, 3),
        "ms_in_kernels": round(sum(event.device_time_total for event in spent) / STEPS / 1e3, 3),
        "kernels": {
            event.key[:60]: [event.count // STEPS, round(event.device_time_total / STEPS, 1)]
            for event in spent[:16]
        },
    }


PARTS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    part.__name__: part for part in (kernels, bench, cap, rounds, memory, profile)
}


def spec_for(folder: Path) -> EngineSpec:
    """The model in `folder`, all of it on the card."""
    return EngineSpec("random", str(folder), DEVICE, packed_dir=str(folder), kernel_dir=str(folder))


def run_part(name: str, folder: Path) -> None:
    """Entry of a part's process."""
    try:
        for found in PARTS[name](folder):
            print(json.dumps({"part": name, **found}, ensure_ascii=False), flush=True)
    except Exception:
        print(json.dumps({"part": name, "failed": traceback.format_exc()[-2000:]}), flush=True)


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--size", default="chatglm-6b-int4", choices=random_model.SIZES)
    asked.add_argument("--only", default=",".join(PARTS))
    options = asked.parse_args()
    if not torch.cuda.is_available():
        print("no card that torch can use", file=sys.stderr)
        return 1
    spawn = multiprocessing.get_context("spawn")
    print(json.dumps({"card": torch.cuda.get_device_name(0), "torch": torch.__version__}), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model.write(folder, options.size)
        for part in options.only.split(","):
            process = spawn.Process(target=run_part, args=(part, folder))
            process.start()
            process.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
