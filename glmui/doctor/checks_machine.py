"""The machine under it all: memory, disk, clock; the port, and a proxy in between."""

from __future__ import annotations

import http.client
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from glmui.doctor.finding import Finding, gb, ok, problem, warning
from glmui.doctor.world import World
from glmui.errors import GlmuiError

GB = 10**9
_BESIDES = 1.5 * GB  # torch, the cache and the app itself
_FULL, _MODEL = 0.5 * GB, 9 * GB  # a disk that is full, and what fetching ChatGLM-6B-INT4 takes for a while
_RELEASED = time.mktime((2026, 1, 1, 0, 0, 0, 0, 0, -1))  # no clock that is right says less
_DAY = 86400.0
_PROBE_SECONDS = 2.0
_MOST = 1000  # bytes read of an answer
_LOCAL = ("127.0.0.1", "localhost")


def memory(world: World) -> Iterator[Finding]:
    """RAM and swap against what the chosen model needs on a CPU."""
    now, need = world.memory(), _needed(world)
    values: dict[str, Any] = {"total": gb(now.total), "free": gb(now.available), "swap": gb(now.swap_free)}
    if not need:
        yield ok("memory", "memory_fine", **values)
        return
    values["need"] = gb(need)
    if need > now.total + now.swap_free:
        yield problem("memory", "memory_too_small", **values)
    elif need > now.total:
        yield warning("memory", "memory_swaps", **values)
    elif need > now.available + _held(world):
        yield warning("memory", "memory_taken", **values)
    elif need > now.available:
        yield ok("memory", "memory_loaded", **values, own=gb(_held(world)))
    else:
        yield ok("memory", "memory_enough", **values)


def _held(world: World) -> int:
    """Bytes of RAM that our own engine process gives back when another model is loaded."""
    return (world.engine.engine_private or 0) if world.engine else 0


def _needed(world: World) -> float:
    """Bytes of RAM that the chosen model takes, 0 where it is unknown or lives on a card."""
    on_card = bool(world.torch().facts.get("visible")) and world.settings.device not in ("cpu", "mixed")
    if not world.settings.model or on_card:
        return 0.0
    from glmui.glm.files import weight_files
    from glmui.hub.installed import resolve

    try:
        folder = resolve(world.settings.model, world.data_dir)
        size = sum(file.stat().st_size for file in weight_files(folder))
    except (GlmuiError, OSError):
        return 0.0  # another check tells
    return size * _growth(folder) + _BESIDES


def _growth(folder: Path) -> int:
    """How many times its files a model takes: float16 ChatGLM is computed in float32, others adapt."""
    from glmui.engine.model_folder import describe
    from glmui.glm.config import read_config

    if not describe(folder).family.startswith("chatglm"):
        return 1
    return 1 if read_config(folder).quantization_bit else 2


def disk(world: World) -> Iterator[Finding]:
    free = world.free_bytes(world.data_dir)
    values: dict[str, Any] = {"folder": world.data_dir, "free": gb(free)}
    if free < _FULL:
        yield problem("disk", "disk_full", **values)
    elif free < _MODEL and not world.settings.model:
        yield warning("disk", "disk_tight", need=gb(_MODEL), **values)
    else:
        yield ok("disk", "disk_fine", **values)


def temporary(world: World) -> Iterator[Finding]:
    folder = Path(tempfile.gettempdir())
    free = world.free_bytes(folder)
    full = free < _FULL
    key = "temporary_full" if full else "temporary_fine"
    yield (warning if full else ok)("temporary", key, folder=folder, free=gb(free))


def clock(world: World) -> Iterator[Finding]:
    """A clock that stands wrong puts conversations out of order and makes encrypted downloads fail."""
    shown = time.strftime("%Y-%m-%d %H:%M", time.localtime(world.now))
    files = [world.data_dir / name for name in ("glmui.db", "settings.toml")]
    newest = max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)
    if world.now < _RELEASED or newest > world.now + _DAY:
        yield warning("clock", "clock_wrong", now=shown)
    else:
        yield ok("clock", "clock_fine", now=shown)


def port(world: World) -> Iterator[Finding]:
    """Whether the page's port is free; glmui itself there is as good."""
    from glmui.listen import FIRST_PORT, state

    wish, host = world.settings.port, world.settings.host
    number = wish or FIRST_PORT
    found = state(host, number, world.data_dir)
    values: dict[str, Any] = {"port": number, "host": host}
    if found in ("free", "glmui"):
        yield ok("port", f"port_{found}", **values)
    elif found == "bad_host":
        yield problem("port", "port_bad_host", **values)
    elif wish:
        yield problem("port", f"port_{found}", program=program_at(number), **values)
    else:
        yield ok("port", "port_next", program=program_at(number), **values)


def program_at(port: int) -> str:
    """Which program listens on a port, as far as this account may know: "python (1234)", or "?"."""
    import psutil

    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr[1] == port and one.pid:
                return f"{psutil.Process(one.pid).name()} ({one.pid})"
    except (psutil.Error, OSError):
        pass
    return "?"


def proxy(world: World) -> Iterator[Finding]:
    """Whether what is meant for this machine would go through a proxy, as the environment has it."""
    proxies = proxies_of(world.environ)
    if not any(proxies.get(kind) for kind in ("http", "all")):
        yield ok("proxy", "proxy_none") if _reached(None) else problem("proxy", "proxy_loopback")
        return
    through = proxies.get("http") or proxies["all"]
    caught = [name for name in _LOCAL if not _bypassed(name, proxies)]
    if not caught:
        yield ok("proxy", "proxy_bypassed", proxy=_bare(through))
    elif not through.startswith("socks") and _reached(through):
        yield warning("proxy", "proxy_lets_through", proxy=_bare(through))
    else:
        yield problem("proxy", "proxy_in_between", proxy=_bare(through), hosts=", ".join(caught))


def proxies_of(environ: Mapping[str, str]) -> dict[str, str]:
    """{"http": address, "all": …, "no": …}. Names in lower case win, as everywhere."""
    found: dict[str, str] = {}
    for name in sorted(environ, key=lambda name: name == name.lower()):
        if name.lower().endswith("_proxy") and environ[name]:
            found[name.lower().removesuffix("_proxy")] = environ[name]
    return found


def _bypassed(host: str, proxies: dict[str, str]) -> bool:
    return bool(urllib.request.proxy_bypass_environment(host, proxies))  # type: ignore[attr-defined]


def _bare(address: str) -> str:
    """A proxy's address without the name and the password that may stand in it."""
    return address.rpartition("@")[2].rpartition("//")[2].rstrip("/")


def _reached(proxy: str | None) -> bool:
    """Whether a page served on this machine's own address really comes back, through that proxy if named."""
    with _greeter() as (number, greeting):
        page = f"http://127.0.0.1:{number}/"
        try:
            return (_fetch_through(proxy, page) if proxy else _fetch(page)) == greeting
        except (OSError, ValueError, http.client.HTTPException):
            return False


def _fetch(page: str) -> bytes:
    """As the system has it: macOS and Windows may name a proxy outside of the environment."""
    handler = urllib.request.ProxyHandler(None if sys.platform in ("win32", "darwin") else {})
    with urllib.request.build_opener(handler).open(page, timeout=_PROBE_SECONDS) as answer:
        return bytes(answer.read(_MOST))


def _fetch_through(proxy: str, page: str) -> bytes:
    """By hand: urllib would heed NO_PROXY, and the question is what happens without it."""
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    there = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=_PROBE_SECONDS)
    with closing(there) as line:
        line.request("GET", page)
        return line.getresponse().read(_MOST)


@contextmanager
def _greeter() -> Iterator[tuple[int, bytes]]:
    """A server on 127.0.0.1 that says one thing: (its port, what it says)."""
    greeting = f"glmui {time.monotonic_ns()}".encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(greeting)))
            self.end_headers()
            self.wfile.write(greeting)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1], greeting
        finally:
            server.shutdown()
