"""glmui beside its neighbours: llama.cpp, chatglm.cpp and the published way, on random models of one size.

    python benchmarks/peers.py [--work DIR] [--rounds 3] [--threads N] [--engines glmui llama.cpp …]

Engines: glmui, "glmui, fast", "glmui, INT8 head", llama.cpp, chatglm.cpp, published.

The neighbours are installed from PyPI into a virtual environment under --work, where the models go too
(11 GB). Where DIR is named both are kept and used again; the first run compiles, half an hour on two cores.
The engines take turns, each turn a fresh process that measures the read limit between its own runs; prints a
table of the rounds' medians. llama.cpp runs a Llama of equal size, for it has no ChatGLM-6B.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import peer_models  # noqa: E402

from glmui.bench import random_model  # noqa: E402
from glmui.engine.device import count_physical_cores  # noqa: E402

SIZE = "chatglm-6b-int4"
CONFIG = random_model.SIZES[SIZE]
PROMPTS = ("128", "512")
PACKAGES = {"llama.cpp": "llama-cpp-python==0.3.36", "chatglm.cpp": "chatglm-cpp==0.4.2"}
BUILD = {"CMAKE_POLICY_VERSION_MINIMUM": "3.5"}  # chatglm-cpp's CMakeLists are older than CMake 4 takes


@dataclass
class Engine:
    """weight_bytes: what decoding one token reads of the weights. turns: what peer_turn.py printed."""

    name: str
    python: str
    model: Path
    weight_bytes: int
    turns: list[dict[str, float]] = field(default_factory=list)

    def decode(self) -> float:
        return statistics.median(turn["decode"] for turn in self.turns)

    def limit(self) -> float:
        return statistics.median(turn["limit"] for turn in self.turns)

    def of_limit(self) -> float:
        """The median of the turns' parts, each beside its own limit."""
        read = self.weight_bytes + self.turns[0]["cache"]
        return statistics.median(read * turn["decode"] / 1e9 / turn["limit"] for turn in self.turns)

    def prefill(self, tokens: str) -> float | None:
        found = [turn[f"prefill_{tokens}"] for turn in self.turns if f"prefill_{tokens}" in turn]
        return statistics.median(found) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for the virtual environment and the models")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=count_physical_cores())
    parser.add_argument("--engines", nargs="+", default=["glmui", "llama.cpp", "chatglm.cpp", "published"])
    options = parser.parse_args()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
        compare(options.work, options)
    else:
        with tempfile.TemporaryDirectory(prefix="peers-") as work:
            compare(Path(work), options)


def compare(work: Path, options: argparse.Namespace) -> None:
    engines = [engine for name in options.engines if (engine := prepare(name, work))]
    for round_ in range(options.rounds):
        for engine in engines:
            prompts = PROMPTS if round_ == 0 else PROMPTS[:1]  # the long one takes minutes in some
            if turn := take_turn(engine, options.threads, prompts):
                engine.turns.append(turn)
                tell(f"round {round_ + 1}, {engine.name}: {json.dumps(turn)}")
    show([engine for engine in engines if engine.turns], options)


def prepare(name: str, work: Path) -> Engine | None:
    """The engine installed and its model written; None, and said, where it cannot be built."""
    models = work / "models"
    models.mkdir(exist_ok=True)
    if name in PACKAGES:
        python = peers_python(work, name)
        write = peer_models.write_gguf if name == "llama.cpp" else peer_models.write_ggml
        model = models / ("llama-q4_0.gguf" if name == "llama.cpp" else "chatglm-q4_0.ggml")
        return Engine(name, python, model, written(model, write)) if python else None
    model = models / "glmui"
    read = written(model, write_own)
    if name.endswith("INT8 head"):
        read -= CONFIG.vocab_size * (CONFIG.hidden_size - 4)  # a byte less each, and a scale for each row
    if name == "published":  # the head is widened once, the layers are read packed and written out again
        read += CONFIG.vocab_size * CONFIG.hidden_size * 2
    return Engine(name, sys.executable, model, read)


def write_own(folder: Path, config: object) -> int:
    folder.mkdir()
    random_model.write(folder, SIZE)
    return (folder / "model.safetensors").stat().st_size


def written(model: Path, write: Callable[..., int]) -> int:
    """Write a model where it is not there yet; bytes that a token reads. They stand beside it in a file."""
    note = model.with_name(f"{model.name}.bytes")
    if not note.exists():
        tell(f"writing {model.name}")
        note.write_text(str(write(model, CONFIG)), encoding="utf-8")
    return int(note.read_text(encoding="utf-8"))


def peers_python(work: Path, name: str) -> str | None:
    """The virtual environment's Python once `name` can be imported there."""
    venv = work / "venv"
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    module = {"llama.cpp": "llama_cpp", "chatglm.cpp": "chatglm_cpp"}[name]
    if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode:
        tell(f"installing {PACKAGES[name]}")
        install = [python, "-m", "pip", "install", "-q", PACKAGES[name], "numpy"]
        if subprocess.run(install, env={**os.environ, **BUILD}, check=False).returncode:
            tell(f"{name} could not be built and is left out")
            return None
    return str(python)


def take_turn(engine: Engine, threads: int, prompts: tuple[str, ...]) -> dict[str, float] | None:
    """One process of one engine; None, and said, when it failed."""
    command = [engine.python, "peer_turn.py", engine.name, str(engine.model), str(threads), *prompts]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if engine.python == sys.executable:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # as in the engine process
    done = subprocess.run(
        command, cwd=ROOT / "benchmarks", env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        tell(f"{engine.name} failed with exit code {done.returncode}")
        return None
    turn: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return turn


def show(engines: list[Engine], options: argparse.Namespace) -> None:
    ours = next((engine for engine in engines if engine.name == "glmui"), None)
    limits = [turn["limit"] for engine in engines for turn in engine.turns]
    low, high = min(limits), max(limits)
    print(f"{options.threads} threads, {options.rounds} rounds, read limit {low:.1f} to {high:.1f} GB/s\n")
    print("| engine | decode tok/s | of limit | prefill 128 | prefill 512 | ours / it, decode | prefill |")
    print("|---|---|---|---|---|---|---|")
    for engine in engines:
        short, long = engine.prefill("128"), engine.prefill("512")
        cells = [f"{engine.decode():.2f}", f"{engine.of_limit():.0%}", number(short, 1), number(long, 1)]
        cells += [number(ratio(ours and ours.decode(), engine.decode()), 2)]
        cells += [number(ratio(ours and ours.prefill("128"), short), 2)]
        print(f"| {engine.name} | {' | '.join(cells)} |")


def ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
