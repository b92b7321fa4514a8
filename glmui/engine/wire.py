"""The pipe between the app and its engine process: one JSON object a message.

JSON, not pickle: the engine reads model files from anywhere, and nothing it says may become code in the app.
"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from glmui import errors
from glmui.types import Chunk, EngineInfo, GenerationParams, Message, Progress, Usage

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


class Wire:
    """One end of the pipe. `send` may be called from any thread, `receive` from one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, kind: str, **values: Any) -> None:
        """Raises OSError when the other end is gone."""
        data = json.dumps({"kind": kind, **values}).encode()
        with self._lock:
            self._connection.send_bytes(data)

    def receive(self) -> dict[str, Any]:
        """The next message, waiting for it. Raises EOFError or OSError when the other end is gone."""
        values: dict[str, Any] = json.loads(self._connection.recv_bytes())
        return values

    def close(self) -> None:
        self._connection.close()


def chat_values(
    messages: list[Message], params: GenerationParams, extras: tuple[str, str] = ("", "")
) -> dict[str, Any]:
    """extras: an EngineSpec's."""
    return {"messages": [asdict(m) for m in messages], "params": asdict(params), "extras": extras}


def chat_from(values: dict[str, Any]) -> tuple[list[Message], GenerationParams]:
    return [Message(**m) for m in values["messages"]], GenerationParams(**values["params"])


def chunk_from(values: dict[str, Any]) -> Chunk:
    """The Chunk that `asdict` took apart."""
    progress, usage = values.pop("progress"), values.pop("usage")
    return Chunk(
        progress=Progress(**progress) if progress else None, usage=Usage(**usage) if usage else None, **values
    )


def info_from(values: dict[str, Any]) -> EngineInfo:
    """The EngineInfo that `asdict` took apart."""
    return EngineInfo(**{**values, "layers": tuple(values["layers"])})


def error_from(values: list[Any]) -> errors.GlmuiError:
    kind, code, details = values
    return errors.from_values(kind, code, details)
