"""Facts that only another process can find out: whatever it runs into ends there, not here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[2]  # where glmui and requirements.txt lie
SECONDS = 30.0  # a first import from a slow disk, or building the kernels, takes its time


@dataclass(frozen=True, slots=True)
class Report:
    """What a process told before its end. facts["doing"]: what it was at when it ended, "" when it was done.

    ending: "" where it ended by itself, else how: "SIGSEGV", "exit code 1"; "time" when its time was up.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    ending: str = ""

    @property
    def doing(self) -> str:
        return str(self.facts.get("doing", "start"))


def ask(
    module: str, *arguments: str, seconds: float = SECONDS, environ: Mapping[str, str] | None = None
) -> Report:
    """Run `python -m module`, which prints its facts as JSON objects, one a line. Raises OSError."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=HOME,
        env=None if environ is None else dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that whatever it started ends with it
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            output, _ = process.communicate()
            return Report(_facts(output), "time")
    return Report(_facts(output), _ending(process.returncode))


def _kill(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        with suppress(ProcessLookupError):  # it ended by itself just now
            os.killpg(process.pid, signal.SIGKILL)


def _facts(output: bytes) -> dict[str, Any]:
    """All objects together; what libraries print between them is passed over."""
    facts: dict[str, Any] = {}
    for line in output.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        facts |= found if isinstance(found, dict) else {}
    return facts


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}" if code else ""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
