"""Work in a process of its own, which by ending gives all its memory back: how it begins, how it is heard."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator
from typing import Any

from glmui.engine.wire import Wire, error_from
from glmui.errors import EngineError

# PASSIVE: OpenMP threads that wait by spinning take the core from the others as soon as the machine has
# anything else to do (3 tokens a second instead of 12).
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
# Not the user's to choose: cards are named on the page, and filled, as NVML counts them (memory/visible.py).
_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def set_environment() -> None:
    """Before torch and transformers are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.update(_ORDER)


def begin() -> None:
    """The first thing in such a process. Ctrl+C is for the one that started it to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_environment()


def messages(
    entry: Callable[..., None], *arguments: Any, died: str
) -> Generator[tuple[Wire, dict[str, Any]]]:
    """Start `entry(connection, *arguments)` in a process, and give what it says until it is done, with the
    pipe for an answer. Once closed, the process is gone.

    Raises EngineError(died), or what the process failed with.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=entry, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    wire = Wire(ours)
    try:
        message: dict[str, Any] = {"kind": ""}
        while message["kind"] != "done":
            message = wire.receive()
            if message["kind"] == "failed":
                raise error_from(message["error"])
            yield wire, message
    except (EOFError, OSError) as error:
        process.join(1)
        raise EngineError(died, detail=process.exitcode) from error
    finally:
        wire.close()
        process.kill()
        process.join()
