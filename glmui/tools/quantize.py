"""`glmui quantize`: a float16 ChatGLM folder made smaller. docs/quantize.md tells what each figure means."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from glmui import i18n
from glmui.engine.wire import Wire, error_from
from glmui.engine.worker import ENVIRONMENT
from glmui.errors import EngineError
from glmui.quantising.job import Job
from glmui.quantising.new_folder import sweep
from glmui.tools.chat import Terminal
from glmui.tools.quantize_results import Results, Say, table


def run(job: Job, language: str, as_json: bool = False) -> int:
    """Do the job, then print what came of it; the exit code.

    Raises GlmuiError; then, as after Ctrl+C, nothing half made is left.
    """

    def say(key: str, **values: Any) -> str:
        return i18n.text(language, f"cli.{key}", **values)

    began, line = time.monotonic(), _Line(say)
    try:
        results = _listen(job, line)
    finally:
        line.wipe()
    results.seconds = time.monotonic() - began
    text = json.dumps(results.as_json(), ensure_ascii=False) if as_json else "\n".join(table(results, say))
    Terminal(language).write(text + "\n")
    return 0


def _listen(job: Job, line: _Line) -> Results:
    """Start the working process, and take what it tells until it is done."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_work, args=(theirs, job), daemon=True)
    process.start()
    theirs.close()
    results = Results(job)
    try:
        with closing(Wire(ours)) as wire:
            while _take(wire.receive(), results, line):
                pass
    except (EOFError, OSError) as error:
        process.join(1)
        raise EngineError("quantize_died", detail=process.exitcode) from error
    finally:
        process.kill()
        process.join()
        sweep(Path(job.target))
    return results


def _work(connection: Connection, job: Job) -> None:
    """Entry of that process. Torch is imported here, after what it reads from the environment is set."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the command's to handle
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from glmui.quantising.run import run as do

    do(connection, job)


def _take(message: dict[str, Any], results: Results, line: _Line) -> bool:
    """Take one message; False for the last. Raises what the process failed with."""
    kind = message.pop("kind")
    if kind == "failed":
        raise error_from(message["error"])
    if kind == "doing":
        line.show(**message)
    elif kind == "chosen":
        results.chosen.append(message)
    elif kind == "written":
        results.size, results.source_size = message["size"], message["source_size"]
    elif kind == "compared":
        results.compared.append(message)
    return bool(kind != "done")


class _Line:
    """One line on standard error that overwrites itself, where someone is looking: the step, and its end."""

    def __init__(self, say: Say) -> None:
        self._say, self._step, self._began = say, "", 0.0

    def show(self, step: str, fraction: float) -> None:
        if not sys.stderr.isatty():
            return
        if step != self._step:
            self._step, self._began = step, time.monotonic()
        spent = time.monotonic() - self._began
        text = f"{self._say(f'quantize.steps.{step}')} {fraction:.0%}"
        if fraction > 0.02 and spent > 1:
            minutes, seconds = divmod(round(spent / fraction * (1 - fraction)), 60)
            text += self._say("quantize.left", time=f"{minutes}:{seconds:02}")
        self._print(text)

    def wipe(self) -> None:
        if self._step:
            self._print("")

    def _print(self, text: str) -> None:
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
