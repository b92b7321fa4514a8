#!/usr/bin/env python3
"""How much memory opening a ChatGLM-6B folder takes, and how long. Linux.

    python benchmarks/load_memory.py FOLDER              # as it is
    python benchmarks/load_memory.py FOLDER --bits 4     # a float16 folder, quantised while loading

Memory is what the load adds to a process that has torch imported already: `anonymous` is private memory,
`total` counts the pages of mapped files too. Both are peaks, sampled every 5 ms: for the load alone, and
with a first token, which touches every weight.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from glmui.engine.loaded import kernel_folder
from glmui.glm.checkpoint import load_model
from glmui.glm.files import weight_files
from glmui.quant.fast import use_kernels
from glmui.quant.kernels.cpu import load


class Watch:
    """Peaks of this process's memory since it was made, above what it had then, in bytes."""

    def __init__(self) -> None:
        self._before = memory()
        self.anonymous = self.total = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            self._look()

    def _look(self) -> None:
        anonymous, total = memory()
        self.anonymous = max(self.anonymous, anonymous - self._before[0])
        self.total = max(self.total, total - self._before[1])

    def peaks(self) -> dict[str, int]:
        self._look()
        return {"anonymous": self.anonymous, "total": self.total}

    def close(self) -> None:
        self._done.set()
        self._thread.join()


def memory() -> tuple[int, int]:
    """(RssAnon, VmRSS) in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return tuple(int(values[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description="memory and time of opening a ChatGLM-6B folder")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, choices=(0, 4, 8), default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--kernels", action="store_true", help="pack the weights for the C kernels, as chat does"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    sizes = [file.stat().st_size for file in weight_files(args.folder)]
    watch, started = Watch(), time.monotonic()
    model = load_model(args.folder, bits=args.bits)
    if args.kernels and (kernels := load(kernel_folder(), args.threads).kernels):
        use_kernels(model, kernels, "exact")
    loaded, peaks = time.monotonic() - started, watch.peaks()
    with torch.inference_mode():
        model(torch.tensor([[5, 20, 130001, 130004]]), last_only=True)
    answered = time.monotonic() - started - loaded
    print(json.dumps({
        "bits": args.bits,
        "file_bytes": sum(sizes),
        "largest_shard_bytes": max(sizes),
        "load_seconds": round(loaded, 2),
        "load_peak": peaks,
        "first_token_seconds": round(answered, 2),
        "peak_with_first_token": watch.peaks(),
        "total_peak_per_file": round(watch.peaks()["total"] / sum(sizes), 3),
    }, indent=2))  # fmt: skip
    watch.close()


if __name__ == "__main__":
    main()
