"""The outermost layer of the app: who may ask, for what, and what a browser may do with the answer.

Gradio checks no Host, trusts foreign origins and fetches URLs for whoever asks (docs/security.md).
So nothing reaches it, or our own routes, before this plain ASGI middleware has looked at the request.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import unquote

from glmui import i18n

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MAX_BODY = 32 * 2**20  # bytes; a whole long conversation travels with some events of the page
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

# What Gradio can do and this app never uses: a path with such a part goes nowhere.
CLOSED = frozenset({
    "upload", "upload_progress", "file", "stream", "deep_link", "process_recording", "run-history", "runs",
    "vibe-edit", "undo-vibe-edit", "vibe-code", "vibe-starter-queries", "dev", "profiling", "monitoring",
    "mcp", "login", "logout",
})  # fmt: skip

_SCRIPT = re.compile(rb"<script\b([^>]*)>(.*?)</script\s*>", re.DOTALL | re.IGNORECASE)
_LOCAL_FILE = re.compile(r"/(?!/)|[a-z]:/(?!/)")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:/")
_FORWARDED = (b"forwarded", b"x-forwarded-", b"x-real-ip", b"x-gradio-")

_HEADERS: Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
]
_REPLACED = (b"access-control-", b"content-security-policy", b"server", *(name for name, _ in _HEADERS))


def allowed_hosts(port: int, *names: str) -> frozenset[str]:
    """Every Host header this app answers to: the loopback names and `names`, each with the real port."""
    hosts = {_bracketed(name.lower()) for name in (*LOOPBACK, *names)}
    with_port = {f"{host}:{port}" for host in hosts}
    return frozenset(with_port | hosts if port == 80 else with_port)


def _bracketed(name: str) -> str:
    return f"[{name}]" if ":" in name and not name.startswith("[") else name


def content_policy(page: bytes = b"") -> str:
    """The Content-Security-Policy for a page: its own inline scripts by hash, everything else from here.

    No 'unsafe-inline' for scripts: an event handler smuggled into a reply cannot run. Gradio turns `js=`
    and its HTML templates into functions at run time, so 'unsafe-eval' must stay.
    """
    inline = [body for attributes, body in _SCRIPT.findall(page) if b"src=" not in attributes]
    hashes = "".join(
        f" 'sha256-{base64.b64encode(hashlib.sha256(body).digest()).decode()}'" for body in inline
    )
    return (
        "default-src 'self'; "
        f"script-src 'self' 'unsafe-eval'{hashes}; "
        "style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; "
        "connect-src 'self'; worker-src 'self' blob:; "
        "object-src 'none'; frame-src 'none'; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
    )


def path_open(path: str) -> bool:
    """Whether `path`, however spelled, may reach the app: `file=` for local paths alone, CLOSED never."""
    plain = _plain(path)
    if plain is None or "/../" in f"{plain}/":
        return False
    for found in re.finditer("file=", plain):
        rest = plain[found.end() :]
        if not _LOCAL_FILE.match(rest) or _SCHEME.search(rest):
            return False
    return "proxy=" not in plain and CLOSED.isdisjoint(plain.split("/"))


def _plain(path: str) -> str | None:
    """`path` with every layer of %-encoding taken off, in lower case; None when it hides behind too many."""
    for _ in range(4):
        decoded = unquote(path)
        if decoded == path:
            printable = all(character.isprintable() for character in path)
            return path.replace("\\", "/").lower() if printable else None
        path = decoded
    return None


class Guard:
    """ASGI middleware around the whole app. hosts: exact Host headers, ports included. max_body: bytes."""

    def __init__(self, app: App, hosts: Iterable[str], max_body: int = MAX_BODY) -> None:
        self.app = app
        self.hosts = frozenset(hosts)
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif refusal := self.refusal(scope):
            await _refuse(scope, send, *refusal)
        else:
            # No proxy stands before us: what claims to come from one is a lie. And on the same machine
            # compressing costs more than it saves.
            dropped = (*_FORWARDED, b"accept-encoding")
            kept = [(name, value) for name, value in scope["headers"] if not name.startswith(dropped)]
            answer = _Answer(send).send if scope["type"] == "http" else send
            await self.app({**scope, "headers": kept}, receive, answer)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """(HTTP status, error code) when this request must not pass."""
        host = _one(scope, b"host")
        if host is None or host.lower() not in self.hosts:
            return 403, "host_refused"
        if not self._same_origin(scope, host):
            return 403, "origin_refused"
        if not path_open(scope["path"]):
            return 404, "path_closed"
        return self._body_refusal(scope) if scope["type"] == "http" else None

    def _same_origin(self, scope: Scope, host: str) -> bool:
        """True for our own pages and for programs that are no browser, which send neither header."""
        site, origin = _all(scope, b"sec-fetch-site"), _all(scope, b"origin")
        scheme = {"ws": "http", "wss": "https"}.get(scope["scheme"], scope["scheme"])
        own = all(value.lower() == f"{scheme}://{host.lower()}" for value in origin) and len(origin) < 2
        near = all(value in ("same-origin", "none") for value in site)
        return own and (near or _is_followed_link(scope))

    def _body_refusal(self, scope: Scope) -> tuple[int, str] | None:
        length = _one(scope, b"content-length") or "0"
        if _all(scope, b"transfer-encoding") or not length.isdecimal():
            return 411, "length_required"
        if int(length) > self.max_body:
            return 413, "body_too_large"
        kind = (_one(scope, b"content-type") or "").split(";")[0].strip().lower()
        if int(length) and kind != "application/json":
            return 415, "json_required"  # a form or text/plain is what a foreign page can send unasked
        return None


class _Answer:
    """Passes one response on: no CORS, our own headers, and for a page its policy made from its scripts."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: Event | None = None
        self._page = b""

    async def send(self, event: Event) -> None:
        if event["type"] == "http.response.start":
            kind = dict(event.get("headers", ())).get(b"content-type", b"")
            if kind.lower().startswith(b"text/html"):
                self._held = event  # the policy needs the whole page
                return
            event = _guarded(event, content_policy())
        elif self._held is not None and event["type"] == "http.response.body":
            self._page += event.get("body", b"")
            if event.get("more_body"):
                return
            await self._send(_guarded(self._held, content_policy(self._page)))
            event = {"type": "http.response.body", "body": self._page}
        await self._send(event)


def _guarded(start: Event, policy: str) -> Event:
    kept = [
        (name, value) for name, value in start.get("headers", ()) if not name.lower().startswith(_REPLACED)
    ]
    return {**start, "headers": [*kept, *_HEADERS, (b"content-security-policy", policy.encode())]}


def _is_followed_link(scope: Scope) -> bool:
    """A link to one of our pages, clicked on some other page: that opens it and can do nothing more."""
    mode, destination = _one(scope, b"sec-fetch-mode"), _one(scope, b"sec-fetch-dest")
    looks = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
    return (
        looks
        and (mode, destination) == ("navigate", "document")
        and "gradio_api" not in scope["path"].lower()
    )


def _all(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key.lower() == name]


def _one(scope: Scope, name: bytes) -> str | None:
    """The header's value, or None when it is missing or said twice."""
    values = _all(scope, name)
    return values[0] if len(values) == 1 else None


async def _refuse(scope: Scope, send: Send, status: int, code: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    language = i18n.pick(_one(scope, b"accept-language"))
    body, kind = refusal_body(code, language, "text/html" in (_one(scope, b"accept") or ""))
    headers = [
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    start = _guarded({"type": "http.response.start", "status": status, "headers": headers}, content_policy())
    await send(start)
    await send({"type": "http.response.body", "body": body if scope["method"] != "HEAD" else b""})


def refusal_body(code: str, language: str, as_page: bool) -> tuple[bytes, bytes]:
    """(body, content type) of a refused request: a sentence for a reader, fields for a program."""
    message = i18n.text(language, f"errors.{code}")
    if as_page:
        page = (
            f'<!doctype html><html lang="{language}"><title>glmui</title><p>{html.escape(message)}</p></html>'
        )
        return page.encode(), b"text/html; charset=utf-8"
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return json.dumps({"error": error}, ensure_ascii=False).encode(), b"application/json"
