"""The linear layers of ChatGLM-6B on this CPU: our kernels and others, beside the read limit.

    python benchmarks/kernels.py [--layers 28] [--rounds 5] [--threads N] [--target avx2] [--busy]

Everything is taken in turn, several rounds long, because the speed of a machine moves: each figure is a
median, and each decode speed stands beside the read limit of its own round. Random weights; at most 5 GB of
memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glmui.engine.device import count_physical_cores
from glmui.quant.kernels.cpu import Kernels, Numerics, Packed, load
from glmui.quant.packing import dequantize_weight

SHAPES = (
    (12288, 4096),
    (4096, 4096),
    (16384, 4096),
    (4096, 16384),
)  # rows, columns of a layer's four linears
HEAD = (130528, 4096)
PROBE_BYTES = 512 << 20
NUMERICS: tuple[Numerics, ...] = ("exact", "balanced", "fast")


@dataclass
class Way:
    """One way to compute a layer. run(rows) does it; bytes are what it must read, for one layer."""

    name: str
    run: Callable[[int], None]
    bytes: int
    layers: int  # how many `run` does
    inputs: tuple[int, ...]  # rows of x it is measured with
    seconds: dict[int, list[float]] = field(default_factory=dict)
    part: dict[int, list[float]] = field(default_factory=dict)  # of the read limit


def seconds_of(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(kernels: Kernels, ways: list[Way], rounds: int) -> list[float]:
    """Fill in every way's figures, in turn; returns the read limits seen, bytes a second."""
    memory = torch.zeros(PROBE_BYTES, dtype=torch.uint8)

    def limit() -> float:
        return PROBE_BYTES / statistics.median(seconds_of(lambda: kernels.read(memory)) for _ in range(3))

    limits = [limit()]
    for way in ways:
        way.run(1)  # pages and caches warm
    for _ in range(rounds):
        for way in ways:
            for rows in way.inputs:
                took = seconds_of(lambda way=way, rows=rows: way.run(rows)) / way.layers  # type: ignore[misc]
                limits.append(limit())
                beside = statistics.mean(limits[-2:])
                way.seconds.setdefault(rows, []).append(took)
                way.part.setdefault(rows, []).append(way.bytes / took / beside)
    return limits


def ways(kernels: Kernels, layers: int) -> list[Way]:
    torch.manual_seed(0)
    inputs = {
        (rows, columns): torch.randn(rows, columns) for rows in (1, 4, 128) for columns in (4096, 16384)
    }
    stored = [torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8) for rows, columns in SHAPES]
    scales = [torch.rand(rows) * 0.01 for rows, _ in SHAPES]
    packed = [
        kernels.pack(w, s, 4, columns)
        for _ in range(layers)
        for w, s, (_, columns) in zip(stored, scales, SHAPES, strict=True)
    ]
    four_bits = sum(w.nbytes for w in stored)

    def ours(numerics: Numerics) -> Way:
        def run(rows: int) -> None:
            for w in packed:
                kernels.linear(inputs[rows, w.columns], w, None, numerics)

        return Way(f"{kernels.name}, {numerics}", run, four_bits, layers, (1, 4, 128))

    def published(rows: int) -> None:
        for w, s, (_, columns) in zip(stored, scales, SHAPES, strict=True):
            torch.nn.functional.linear(
                inputs[rows, columns], dequantize_weight(w, s, 4, columns, torch.float32)
            )

    wide = [
        dequantize_weight(w, s, 4, shape[1], torch.float32)
        for w, s, shape in zip(stored, scales, SHAPES, strict=True)
    ]

    def floats(rows: int) -> None:
        for w in wide:
            torch.nn.functional.linear(inputs[rows, w.shape[1]], w)

    return [
        *map(ours, NUMERICS),
        Way("torch, float32 weights", floats, four_bits, 1, (1, 4, 128)),
        Way("the published way: widen, then multiply", published, four_bits, 1, (1, 128)),
    ]


def head_ways(kernels: Kernels) -> list[Way]:
    rows, columns = HEAD
    half = torch.randn(1, columns).half().repeat(rows, 1)
    eight = kernels.pack(
        torch.randint(-127, 128, HEAD, dtype=torch.int8), torch.rand(rows) * 0.01, 8, columns
    )
    x = torch.randn(1, columns)

    def torch_half(count: int) -> None:
        torch.nn.functional.linear(x.half(), half)

    return [
        Way("head, float16", lambda count: void(kernels.half(x, half)), half.nbytes, 1, (1,)),
        *(
            Way(
                f"head, INT8, {n}",
                lambda count, n=n: void(kernels.linear(x, eight, None, n)),
                eight.weight.nbytes,
                1,
                (1,),
            )  # type: ignore[misc]
            for n in NUMERICS
        ),
        Way("head, float16, torch", torch_half, half.nbytes, 1, (1,)),
    ]


def void(_: Tensor) -> None: ...


def errors(kernels: Kernels, packed_of: Callable[[Tensor, Tensor, int], Packed]) -> dict[str, float]:
    """Relative distance from float64 of each numerics: the worst of the four shapes, one row and eight."""
    found = dict.fromkeys(NUMERICS, 0.0)
    for rows, columns in SHAPES:
        stored = torch.randint(-128, 128, (rows // 8, columns // 2), dtype=torch.int8)
        scale = torch.rand(len(stored)) * 0.01
        matrix = dequantize_weight(stored, scale, 4, columns, torch.float64)
        packed = packed_of(stored, scale, columns)
        for x in (torch.randn(1, columns), torch.randn(8, columns)):
            wanted = x.double() @ matrix.T
            for numerics in NUMERICS:
                distance = (
                    kernels.linear(x, packed, None, numerics).double() - wanted
                ).norm() / wanted.norm()
                found[numerics] = max(found[numerics], distance.item())
    return found


def spin_forever() -> None:
    while True:
        pass


def table(found: list[Way], layers: int) -> None:
    """layers: how many make a token."""
    print("| | decode GB/s | of limit | ms a token | 4 rows, rows/s | 128 rows, rows/s |")
    print("|---|---|---|---|---|---|")
    for way in found:
        took = {rows: statistics.median(values) * layers for rows, values in way.seconds.items()}
        speed, part = way.bytes * layers / took[1] / 1e9, statistics.median(way.part[1])
        many = [f"{rows / took[rows]:.1f}" if rows in took else "" for rows in (4, 128)]
        print(
            f"| {way.name} | {speed:.1f} | {100 * part:.0f} % | {took[1] * 1e3:.1f} | {many[0]} | {many[1]} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=count_physical_cores())
    parser.add_argument("--target")
    parser.add_argument(
        "--busy", action="store_true", help="keep one core busy with another program meanwhile"
    )
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(Path(folder), chosen.threads, chosen.target)
        if not loaded.kernels:
            sys.exit(f"no kernels: {loaded.reason}")
        kernels = loaded.kernels
        other = multiprocessing.get_context("spawn").Process(target=spin_forever, daemon=True)
        if chosen.busy:
            other.start()
        layers = ways(kernels, chosen.layers)
        limits = measure(kernels, layers, chosen.rounds)
        seen = ", ".join(
            f"{limit / 1e9:.1f}" for limit in (min(limits), statistics.median(limits), max(limits))
        )
        print(f"{kernels.name}, {chosen.threads} threads; read limit GB/s: lowest, median, highest {seen}\n")
        table(layers, 28)
        layers.clear()
        head = head_ways(kernels)
        measure(kernels, head, chosen.rounds)
        print("\nThe output head alone:\n")
        table(head, 1)
        print("\nError relative to float64:", errors(kernels, lambda w, s, c: kernels.pack(w, s, 4, c)))
        if chosen.busy:
            other.terminate()


if __name__ == "__main__":
    main()
