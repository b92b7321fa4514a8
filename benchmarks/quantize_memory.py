#!/usr/bin/env python3
"""How much memory and time `glmui quantize` takes. Linux.

    python benchmarks/quantize_memory.py FLOAT16_FOLDER RESULT [flags of quantize ...]

Memory is that of the command and its working process, sampled 20 times a second: `anonymous_gb` is the most
private memory that one of the two had, `total_gb` counts the pages of mapped files too. RESULT stays.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def memory(process: psutil.Process) -> dict[str, int]:
    """RssAnon and VmRSS in bytes."""
    lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    values = dict(line.split(":", 1) for line in lines)
    names = {"anonymous": "RssAnon", "total": "VmRSS"}
    return {name: int(values[key].split()[0]) * 1024 for name, key in names.items() if key in values}


def main() -> int:
    began, peaks = time.monotonic(), {"anonymous": 0, "total": 0}
    command = psutil.Popen([sys.executable, "-m", "glmui", "quantize", *sys.argv[1:]], cwd=ROOT)
    while command.poll() is None:
        with contextlib.suppress(psutil.Error, OSError):
            for process in (command, *command.children(recursive=True)):
                for name, size in memory(process).items():
                    peaks[name] = max(peaks[name], size)
        time.sleep(0.05)
    figures = {f"{name}_gb": round(size / 1e9, 3) for name, size in peaks.items()}
    print(json.dumps({**figures, "seconds": round(time.monotonic() - began, 1)}))
    return int(command.returncode)


if __name__ == "__main__":
    sys.exit(main())
