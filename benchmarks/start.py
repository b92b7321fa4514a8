"""How long until the splash answers, until the page does, and what the quick way to import gradio saves.

    python benchmarks/start.py [--runs 5]

Prints medians of wall seconds from the start of `python app.py`, with the scripted engine and an empty data
folder; then the import of gradio, plain and the quick way, taken in turn, and their ratio.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = {
    "plain": "import gradio",
    "quick": "from glmui import server, settings; server.import_gradio(settings.Settings())",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    starts = [start() for _ in range(runs + 1)][1:]
    print(f"first splash  {statistics.median(s for s, _ in starts):6.2f} s")
    print(f"first page    {statistics.median(p for _, p in starts):6.2f} s")
    took: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(runs + 1):
        for name, code in IMPORTS.items():
            began = time.monotonic()
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
            took[name].append(time.monotonic() - began)
    for name, seconds in took.items():
        print(f"import gradio, {name:5} {statistics.median(seconds[1:]):6.2f} s")
    ratios = [q / p for p, q in zip(took["plain"][1:], took["quick"][1:], strict=True)]
    print(f"quick / plain {statistics.median(ratios):6.2f}")


def start() -> tuple[float, float]:
    """(seconds to the splash, seconds to the page) of one start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "app.py", "--no-browser", "--model", "echo"]
        command += ["--port", str(port), "--data-dir", folder]
        began = time.monotonic()
        app = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            splash = answered(f"http://127.0.0.1:{port}/", began, b"")
            page = answered(f"http://127.0.0.1:{port}/", began, b"gradio_config")
        finally:
            app.terminate()
            app.wait()
    return splash, page


def answered(address: str, began: float, holding: bytes) -> float:
    """Seconds from `began` until the address answers 200 with a page that holds these bytes."""
    while time.monotonic() - began < 120:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                if holding in answer.read():
                    return time.monotonic() - began
        except OSError:
            pass
        time.sleep(0.01)
    raise TimeoutError(address)


if __name__ == "__main__":
    main()
