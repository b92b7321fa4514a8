"""The listening socket, the page's address, and whether glmui already answers there."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glmui import __version__
from glmui.errors import InvalidInput

FIRST_PORT = 7860
PORTS_TRIED = 21
WHOAMI = "/glmui/whoami"
_BACKLOG = 128

State = Literal["free", "glmui", "other_glmui", "taken", "forbidden", "bad_host"]


@dataclass(frozen=True)
class Running:
    """glmui answers on this port already, for the same data folder."""

    port: int


def whoami(data_dir: Path, ready: bool) -> dict[str, Any]:
    """What GET /glmui/whoami answers: enough to recognise glmui, nothing about what is in it."""
    return {"app": "glmui", "version": __version__, "data_dir_id": data_dir_id(data_dir), "ready": ready}


def data_dir_id(data_dir: Path) -> str:
    """Tells two data folders apart without naming them."""
    return hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:16]


def listen(host: str, port: int | None, data_dir: Path) -> socket.socket | Running:
    """A listening socket on `port`, or without one on 7860 or the next free port after it.

    Raises InvalidInput when no port is free, the named one is taken, or `host` is none of this machine's.
    """
    ports = range(FIRST_PORT, FIRST_PORT + PORTS_TRIED) if port is None else (port,)
    for candidate in ports:
        try:
            return _bind(host, candidate)
        except OSError as error:
            reserved = port is None and error.errno == errno.EACCES  # Windows keeps some ports for itself
            if error.errno != errno.EADDRINUSE and not reserved:
                raise _explained(error, host, candidate) from error
        if is_running(host, candidate, data_dir):
            return Running(candidate)
    if port is None:
        raise InvalidInput("no_free_port", first=ports[0], last=ports[-1])
    raise InvalidInput("port_taken", port=port)


def _bind(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if sys.platform == "win32":  # there SO_REUSEADDR would let two programs share one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _explained(error: OSError, host: str, port: int) -> InvalidInput:
    if error.errno == errno.EACCES:
        return InvalidInput("port_forbidden", port=port)
    return InvalidInput("bad_host", host=host, detail=error.strerror or error)


def is_running(host: str, port: int, data_dir: Path) -> bool:
    """Whether glmui answers there for this very data folder."""
    answer = _ask(host, port)
    return answer.get("app") == "glmui" and answer.get("data_dir_id") == data_dir_id(data_dir)


def _ask(host: str, port: int) -> dict[str, Any]:
    """What /glmui/whoami answers there, {} where no glmui does."""
    connection = http.client.HTTPConnection(reachable(host), port, timeout=2)
    try:
        connection.request("GET", WHOAMI)
        answer = json.loads(connection.getresponse().read(10_000))
    except (OSError, ValueError, http.client.HTTPException):
        return {}
    finally:
        connection.close()
    return answer if isinstance(answer, dict) else {}


def state(host: str, port: int, data_dir: Path) -> State:
    """What a port is to glmui now: free, answered by glmui (for this data folder, or another), taken by
    another program, or not to be had. "bad_host": the address is none of this machine's."""
    try:
        _bind(host, port).close()
        return "free"
    except OSError as error:
        if error.errno == errno.EACCES:
            return "forbidden"
        if error.errno != errno.EADDRINUSE:
            return "bad_host"
    answer = _ask(host, port)
    if answer.get("app") != "glmui":
        return "taken"
    return "glmui" if answer.get("data_dir_id") == data_dir_id(data_dir) else "other_glmui"


def reachable(host: str) -> str:
    """The name to reach `host` by on this machine: "all addresses" is not an address one can open."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def address(host: str, port: int) -> str:
    """The page's address for the browser."""
    name = reachable(host)
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/"
