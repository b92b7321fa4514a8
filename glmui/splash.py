"""A first page from the standard library alone, on the socket the app will take over.

The app needs seconds to import what it is made of; the browser is opened at once and must see something.
"""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from typing import Any

from glmui import i18n, security
from glmui.listen import WHOAMI

_PAGE = Path(__file__).resolve().parent.parent / "assets" / "splash.html"
_POLL_SECONDS = 0.05  # how late the hand-over may be
_SILENCE_SECONDS = 5  # a browser opens connections ahead of need and may never use them
_MOST_BODY = 2**20  # bytes of a refused request's body still read, so that the answer arrives


class Splash:
    """Answers on `listener` from a thread until `stop`; connections waiting then are left to the app.

    `hosts` as in security.Guard; `identity` is the answer of /glmui/whoami; `language` "" is the browser's.
    """

    def __init__(
        self, listener: socket.socket, hosts: frozenset[str], identity: dict[str, Any], language: str = ""
    ) -> None:
        self._server = _Server(listener)
        self._server.hosts = hosts
        self._server.identity = json.dumps(identity).encode()
        self._server.language = language
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="splash", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Accept nothing more; the listening socket stays open. Calling it again does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    hosts: frozenset[str]
    identity: bytes
    language: str

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()  # made unasked by socketserver
        self.socket = listener

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, peer = super().get_request()
        connection.settimeout(_SILENCE_SECONDS)
        return connection, peer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "glmui"
    sys_version = ""

    def do_GET(self) -> None:
        language = self._language()
        if (self.headers.get("Host") or "").lower() not in self.server.hosts:
            self._answer(403, *security.refusal_body("host_refused", language, as_page=False))
        elif self.path == "/" or self.path.startswith("/?"):
            self._answer(200, page(language), b"text/html; charset=utf-8")
        elif self.path == WHOAMI:
            self._answer(200, self.server.identity, b"application/json")
        else:
            self._not_yet()

    do_HEAD = do_GET

    def _not_yet(self) -> None:
        length = self.headers.get("Content-Length") or "0"
        if length.isdecimal():
            self.rfile.read(min(int(length), _MOST_BODY))
        self._answer(503, *security.refusal_body("starting", self._language(), as_page=False))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _not_yet

    def _language(self) -> str:
        return self.server.language or i18n.pick(self.headers.get("Accept-Language"))

    def _answer(self, status: int, body: bytes, kind: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind.decode())
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", security.content_policy(body))
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


def page(language: str) -> bytes:
    """The splash in "en" or "zh"."""
    words = {name: i18n.text(language, f"splash.{name}") for name in ("starting", "ended")}
    words |= {"language": language, "whoami": WHOAMI}
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(words).encode()
