"""`glmui quantize`: a float16 ChatGLM folder made smaller. docs/quantize.md tells what each figure means."""

from __future__ import annotations

import json
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

from glmui.engine.own_process import begin, messages
from glmui.quantizing.job import QuantizeJob
from glmui.quantizing.new_folder import sweep
from glmui.tools.chat import Terminal
from glmui.tools.quantize_results import Results, Say, table


def run(job: QuantizeJob, language: str, as_json: bool = False) -> int:
    """Do the job, then print what came of it; the exit code.

    Raises GlmuiError; then, as after Ctrl+C, nothing half made is left.
    """
    began, terminal = time.monotonic(), Terminal(language)
    try:
        results = _listen(job, terminal)
    finally:
        terminal.write("")  # the line that told how far it was
    results.seconds = time.monotonic() - began
    lines = [json.dumps(results.as_json(), ensure_ascii=False)] if as_json else table(results, terminal.words)
    terminal.write("\n".join(lines) + "\n")
    return 0


def _listen(job: QuantizeJob, terminal: Terminal) -> Results:
    """Start the working process, and take what it tells until it is done."""
    results, clock = Results(job), _Clock(terminal.words)
    try:
        with closing(messages(_work, job, died="quantize_died")) as told:
            for _, message in told:
                if message["kind"] == "doing":
                    terminal.show_line(clock.words(message["step"], message["fraction"]))
                else:
                    results.take(**message)
    finally:
        sweep(Path(job.target))
    return results


def _work(connection: Connection, job: QuantizeJob) -> None:
    """Entry of that process. Torch is imported here, after what it reads from the environment is set."""
    begin()
    from glmui.quantizing.run import run as do

    do(connection, job)


class _Clock:
    """Words for how far the step at hand is, and when it will be done."""

    def __init__(self, say: Say) -> None:
        self._say, self._step, self._began = say, "", 0.0

    def words(self, step: str, fraction: float) -> str:
        if step != self._step:
            self._step, self._began = step, time.monotonic()
        spent = time.monotonic() - self._began
        text = f"{self._say(f'quantize.steps.{step}')} {fraction:.0%}"
        if fraction > 0.02 and spent > 1:
            minutes, seconds = divmod(round(spent / fraction * (1 - fraction)), 60)
            text += self._say("quantize.left", time=f"{minutes}:{seconds:02}")
        return text
