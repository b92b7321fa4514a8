"""How long a model folder takes to import, and how much memory the importing process needs.

    python benchmarks/import_model.py FOLDER [--quantize int4|int8] [--work DIR]

The result is thrown away. A full-size folder of random weights is as good as a real one for this.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glmui.confined import own_memory
from glmui.hub.importing import import_model
from glmui.types import Progress


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantize", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--work", type=Path, help="where the result is written for a moment")
    options = parser.parse_args()
    began, stages, peak = time.monotonic(), {}, {"own": 0, "with mapped files": 0}
    over = threading.Event()

    def told(progress: Progress) -> None:
        stages[progress.stage] = time.monotonic() - began

    watcher = threading.Thread(target=watch, args=(over, peak), daemon=True)
    watcher.start()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        import_model(options.folder, Path(work) / "made", None, options.quantize, {}, told, lambda: False)
        total = time.monotonic() - began
    over.set()
    watcher.join()
    steps = ", ".join(f"{stage} until {seconds:.1f} s" for stage, seconds in stages.items())
    print(f"{total:.1f} s ({steps})")
    print(", ".join(f"{what} {size / 1e9:.2f} GB" for what, size in peak.items()))
    return 0


def watch(over: threading.Event, peak: dict[str, int]) -> None:
    """Keep the most that this process's children had, looked at twenty times a second."""
    me = psutil.Process()
    while not over.wait(0.05):
        for child in me.children():
            try:
                sizes = {"own": own_memory(child), "with mapped files": child.memory_info().rss}
            except psutil.Error:
                continue
            peak.update({what: max(peak[what], size) for what, size in sizes.items()})


if __name__ == "__main__":
    sys.exit(main())
