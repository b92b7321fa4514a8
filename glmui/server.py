"""From a socket to a page: the splash at once, the app on the same socket as soon as it is there."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import signal
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from glmui import i18n, logs
from glmui.listen import WHOAMI, Running, address, listen, whoami
from glmui.security import App, Guard, Receive, Scope, Send, allowed_hosts
from glmui.settings import Settings, make_data_folder
from glmui.splash import Splash

if TYPE_CHECKING:
    import socket

log = logging.getLogger(__name__)

TRASH_SECONDS = 30 * 86400  # so long a deleted conversation can be brought back
GRACE_SECONDS = 1  # for open answers, once the end is asked for
END_SECONDS = 2.6  # then whatever still hangs is left behind


@dataclass(frozen=True)
class House:
    """The app behind the security layer, and how to end what stands behind it."""

    app: App
    close: Callable[[], None]


Build = Callable[[Settings], House]


def serve(settings: Settings, language: str = "en", build: Build | None = None) -> int:
    """Show the page until Ctrl+C (130) or SIGTERM (0); the exit code. `language` is the terminal's.

    Raises GlmuiError when it cannot start.
    """
    make_data_folder(settings.data_dir)
    found = listen(settings.host, settings.port, settings.data_dir)
    if isinstance(found, Running):
        return _show_running(settings, found.port, language)
    handler = logs.start(settings.data_dir, settings.log_level)
    try:
        with found as listener, _ended_by_signals():
            return _serve_on(listener, settings, language, build or build_app)
    finally:
        logs.stop(handler)


def _serve_on(listener: socket.socket, settings: Settings, language: str, build: Build) -> int:
    port = listener.getsockname()[1]
    hosts = allowed_hosts(port, settings.host)
    page = address(settings.host, port)
    _say(language, "cli.serve.address", address=page)
    if not settings.host.startswith("127.") and settings.host not in ("localhost", "::1"):
        _say(language, "cli.serve.open_to_others", host=settings.host)
    splash = Splash(listener, hosts, whoami(settings.data_dir, ready=False), settings.language)
    if settings.browser:
        open_browser(page)
    log.info("glmui listens on port %s", port)
    try:
        house = build(settings)
    finally:
        splash.stop()
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(house.close)
        app = Identity(house.app, whoami(settings.data_dir, ready=True))
        _answer(listener, Guard(app, hosts), at_the_end.close)
    return 0


def _answer(listener: socket.socket, app: App, close: Callable[[], None]) -> None:
    """Run uvicorn until a signal ends it, then `close` (which may be called again later)."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            close()  # here, because asyncio goes on to wait for its threads, and one of them may hang

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if not self.should_exit:
                _end_within(END_SECONDS)
                logging.getLogger("uvicorn.error").disabled = True  # pages cut short now are no errors
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    Server(config).run(sockets=[listener])


def _end_within(seconds: float) -> None:
    """A thread that hangs in a library must not keep the program alive. What is saved is safe already."""
    last_resort = threading.Timer(seconds, os._exit, (1,))
    last_resort.daemon = True
    last_resort.start()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM, and the terminal's closing, unwind the program instead of cutting it off."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, end)}
    if sys.platform != "win32":
        hang_up = signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
        before[signal.SIGHUP] = hang_up
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Identity:
    """Answers /glmui/whoami; everything else goes to `app`."""

    def __init__(self, app: App, identity: dict[str, Any]) -> None:
        self._app = app
        self._body = json.dumps(identity).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != WHOAMI:
            await self._app(scope, receive, send)
            return
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(self._body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else self._body})


def _show_running(settings: Settings, port: int, language: str) -> int:
    page = address(settings.host, port)
    _say(language, "cli.serve.already", address=page)
    if settings.browser:
        opening = open_browser(page)
        opening.join(timeout=10)  # this program ends now; the browser should have been started by then
    return 0


def _say(language: str, key: str, **values: Any) -> None:
    print(i18n.text(language, key, **values), flush=True)


def open_browser(page: str) -> threading.Thread:
    """Open the page from a thread of its own: some browsers are slow to start, and none is needed."""

    def open_it() -> None:
        try:
            webbrowser.open(page)
        except Exception:  # whatever a desktop may come up with
            log.warning("the browser did not open", exc_info=True)

    opening = threading.Thread(target=open_it if has_desktop() else lambda: None, name="browser", daemon=True)
    opening.start()
    return opening


def has_desktop() -> bool:
    """Whether a browser window can appear. Without one, `webbrowser` would start lynx in the terminal."""
    if sys.platform in ("win32", "darwin"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))


def import_gradio(settings: Settings) -> None:
    """Import gradio, deaf to GRADIO_* of the environment, silent towards the network, in half its usual time.

    At every import gradio writes a `.pyi` file beside each of its components, unless Python cannot tell
    where the component's source is. Here it cannot. Should gradio mind one day, it is imported plainly.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(settings.data_dir / "cache" / "gradio")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "gradio" in sys.modules:
        return
    try:
        with _hidden_sources("gradio"):
            import gradio
    except OSError:
        log.warning("gradio could not be imported the quick way", exc_info=True)
        for name in [name for name in sys.modules if name.partition(".")[0] == "gradio"]:
            del sys.modules[name]
        import gradio  # noqa: F401


@contextlib.contextmanager
def _hidden_sources(package: str) -> Iterator[None]:
    """Within, `inspect.getfile` knows no file of the package's classes."""
    tell = inspect.getfile

    def getfile(object: Any) -> str:
        if inspect.isclass(object) and object.__module__.partition(".")[0] == package:
            raise OSError("hidden while glmui imports it")
        return tell(object)

    inspect.getfile = getfile
    try:
        yield
    finally:
        inspect.getfile = tell


def build_app(settings: Settings) -> House:
    """Put the app together: what may refuse first, what takes long last."""
    from glmui.chat import ChatService
    from glmui.choice import Choice
    from glmui.downloads import Downloads
    from glmui.engine.client import EngineClient
    from glmui.memory.spill import SpillWatch
    from glmui.meter import Meter
    from glmui.outlook import foreseer
    from glmui.store import Store
    from glmui.text import open_counter

    with contextlib.ExitStack() as unfinished:
        store = Store.open(settings.data_dir)
        unfinished.callback(store.close)
        import_gradio(settings)
        from fastapi import FastAPI

        from glmui.ui.desk import Desk
        from glmui.ui.mount import mount
        from glmui.ui.shelf import Shelf

        # Opening a vocabulary takes a while.
        counter = lru_cache(maxsize=1)(lambda folder, family: open_counter(Path(folder), family))
        choice, meter = Choice(settings), Meter()
        store.purge(time.time() - TRASH_SECONDS)
        spill = SpillWatch(meter, settings.data_dir)
        engine = EngineClient(idle_seconds=settings.idle_minutes * 60, remark=spill.remark)

        service = ChatService(
            store,
            engine,
            choice.spec,
            lambda spec: counter(spec.folder, spec.chatglm_family),
            foreseer(engine, meter),
        )
        downloads = Downloads(lambda: choice.settings, choice.take_up)
        app = FastAPI(openapi_url=None)
        shelf = Shelf(service, choice, downloads, meter)
        mount(app, Desk(service, choice, shelf, meter))
        unfinished.pop_all()
    if settings.starter:
        downloads.get("starter")

    def close() -> None:
        downloads.close()
        service.close()
        meter.close()

    return House(app, close)
