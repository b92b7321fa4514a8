"""The security layer around a tiny app: which requests reach it, and what its answers carry."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from typing import Any

import pytest

from glmui.security import Guard, allowed_hosts, content_policy, path_open

PORT = 7860
PAGE = b"<!doctype html><script>go()</script><script src='/a.js'></script>"
ROUTES = (
    "/",
    "/config",
    "/gradio_api/queue/join",
    "/gradio_api/heartbeat/x",
    "/glmui/whoami",
    "/assets/a.js",
)

OWN_HOSTS = ("127.0.0.1:7860", "localhost:7860", "[::1]:7860", "LOCALHOST:7860", "LocalHost:7860")
FOREIGN_HOSTS = (
    "", " ", "evil.example", "evil.example:7860", "127.0.0.1", "localhost", "[::1]", "::1", "::1:7860",
    "127.0.0.1:80", "127.0.0.1:7861", "localhost:80", "localhost:", "localhost:07860",
    "localhost:7860:7860", "localhost.:7860", "localhost.evil.example:7860",
    "evil.example/localhost:7860", "localhost:7860.evil.example", "localhost:7860@evil.example",
    "evil.example@localhost:7860", "user@127.0.0.1:7860", "http://localhost:7860", "localhost:7860/",
    "localhost:7860?", "localhost:7860#", "localhost :7860", "local host:7860", "\tevil:7860",
    "127.1:7860", "127.0.1:7860", "127.0.0.2:7860", "127.0.0.1.:7860", "127.000.000.001:7860",
    "0177.0.0.1:7860", "0x7f.0.0.1:7860", "2130706433:7860", "0x7f000001:7860", "0.0.0.0:7860", "0:7860",
    "[::]:7860", "[0:0:0:0:0:0:0:1]:7860", "[::ffff:127.0.0.1]:7860", "[::1%lo]:7860", "[::1]",
    "[::1]:80", "[::1:7860", "192.168.1.5:7860", "10.0.0.1:7860", "169.254.169.254:7860", "glmui:7860",
    "glmui.local:7860", "localhost,evil.example:7860", "localhost:7860,evil.example", "ｌocalhost:7860",
    "localhost%00:7860", "localhost:7860\x00", "127.0.0.1.nip.io:7860", "localtest.me:7860", "null", "*",
    "*:7860", "ⅼocalhost:7860", "xn--localhost:7860",
)  # fmt: skip


def request(path: str = "/", method: str = "GET", **options: Any) -> Any:
    """(status, headers, body, what the app saw or None) of one request through a Guard."""
    pairs = options.get("pairs", [("host", f"127.0.0.1:{PORT}")])
    headers = [(k.encode(), v.encode("utf-8")) for k, v in [*pairs, *options.get("extra", {}).items()]]
    kind = options.get("kind", "http")
    scope = {"type": kind, "method": method, "path": path, "scheme": "ws" if kind == "websocket" else "http"}
    scope["headers"] = headers
    seen: list[Any] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        mime = b"text/html; charset=utf-8" if path == "/" else b"application/json"
        headers = [(b"content-type", mime), (b"access-control-allow-origin", b"*"), (b"Server", b"x")]
        headers.append((b"cache-control", b"max-age=60"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": PAGE[:9], "more_body": True})
        await send({"type": "http.response.body", "body": PAGE[9:]})

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(event: Any) -> None:
        sent.append(event)

    asyncio.run(Guard(app, allowed_hosts(PORT), max_body=1000)(scope, receive, send))
    status = sent[0].get("status", sent[0].get("code"))
    answer = b"".join(event.get("body", b"") for event in sent[1:])
    return status, dict(sent[0].get("headers", ())), answer, seen[0] if seen else None


def passes(**options: Any) -> bool:
    return request(**options)[3] is not None


def test_enough_host_forms() -> None:
    assert len(set(OWN_HOSTS + FOREIGN_HOSTS)) >= 60


@pytest.mark.parametrize("path", ROUTES)
def test_only_the_listed_hosts_pass(path: str) -> None:
    for host in OWN_HOSTS:
        assert passes(path=path, pairs=[("host", host)]), host
    for host in FOREIGN_HOSTS:
        status, _, _, seen = request(path, pairs=[("host", host)])
        assert (status, seen) == (403, None), host


def test_no_host_or_two_are_refused() -> None:
    assert not passes(pairs=[])
    assert not passes(pairs=[("host", "localhost:7860"), ("host", "localhost:7860")])
    assert not passes(pairs=[("host", "evil:7860")], extra={"x-forwarded-host": "localhost:7860"})


def test_a_named_host_is_added() -> None:
    assert "192.168.1.5:7860" in allowed_hosts(7860, "192.168.1.5")
    assert "[fd00::1]:7860" in allowed_hosts(7860, "FD00::1")
    assert "localhost" in allowed_hosts(80)
    assert "localhost" not in allowed_hosts(7860)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "extra",
    [
        {"origin": "null"},
        {"origin": "http://evil.example"},
        {"origin": "https://127.0.0.1:7860"},
        {"origin": "http://127.0.0.1:7861"},
        {"origin": "http://127.0.0.1"},
        {"origin": "http://localhost:7860"},
        {"origin": "http://127.0.0.1:7860.evil.example"},
        {"origin": "http://127.0.0.1:7860/"},
        {"origin": ""},
        {"origin": "file://"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": "http://127.0.0.1:7860"},
        {"sec-fetch-site": "same-origin", "origin": "http://evil.example"},
    ],
)
def test_other_origins_are_refused_whatever_the_method(method: str, extra: dict[str, str]) -> None:
    status, _, _, seen = request("/gradio_api/queue/join", method, extra=extra)
    assert (status, seen) == (403, None)
    assert not passes(path="/", method=method, extra=extra)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:7860"},
        {"origin": "http://127.0.0.1:7860", "content-type": "application/json", "content-length": "2"},
    ],
)
def test_our_own_page_and_programs_pass(extra: dict[str, str]) -> None:
    assert passes(path="/gradio_api/queue/join", method="POST", extra=extra)


def test_websockets_are_checked_too() -> None:
    assert request("/x", kind="websocket", extra={"origin": "http://evil.example"})[0] == 1008
    assert request("/x", kind="websocket", pairs=[("host", "evil:7860")])[0] == 1008
    assert passes(path="/x", kind="websocket", extra={"origin": "http://127.0.0.1:7860"})


def test_a_link_on_another_site_opens_the_page_and_nothing_else() -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert passes(path="/", extra=link)
    assert not passes(path="/", method="POST", extra=link)
    assert not passes(path="/gradio_api/info", extra=link)
    assert not passes(path="/", extra={**link, "sec-fetch-dest": "iframe"})


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=https://evil.example/x", "/gradio_api/file=http:/evil.example",
        "/gradio_api/FILE=HTTP://x", "/gradio_api/file=%68ttp://evil", "/gradio_api/file%3Dhttp://evil",
        "/gradio_api/file=http%3A%2F%2Fevil", "/gradio_api/file=%2568ttps://evil",
        "/gradio_api/%66ile=http://e", "//gradio_api//file=http://evil", "/gradio_api/./file=http://e",
        "/file=http://evil", "/gradio_api/file=//evil.example/x", "/gradio_api/file=\\\\evil\\share",
        "/gradio_api/file=/\\evil/share", "/gradio_api/file=ftp://e",
        "/gradio_api/file=data:text/html,x", "/gradio_api/file=file:///etc/passwd", "/gradio_api/file=",
        "/gradio_api/file=../../etc/passwd", "/gradio_api/file=/tmp/../etc/passwd",
        "/gradio_api/file=/tmp/%2e%2e/x", "/gradio_api/file=/a/..%5cb", "/gradio_api/file=relative.txt",
        "/gradio_api/file=/x/http://evil", "/gradio_api/file=/x/file=http://evil",
        "/gradio_api/file=c:\\..\\secret", "/gradio_api/file=%0ahttp://e",
        "/gradio_api/file=%25252525252568ttp://e", "/gradio_api/file=/a%00b",
        "/gradio_api/file/https://evil", "/gradio_api/file/etc/passwd", "/file/etc/passwd",
        "/gradio_api//file/x", "/gradio_api/%66ile/x", "/gradio_api/FILE/x", "/en/gradio_api/file/x",
        "/gradio_api/proxy=https://x.hf.space", "/gradio_api/PROXY=x", "/proxy%3Dx",
        "/gradio_api/%70roxy=x", "/gradio_api/upload", "/gradio_api/upload/", "/gradio_api//upload",
        "/gradio_api/%75pload", "/upload", "/zh/gradio_api/upload", "/gradio_api/upload_progress",
        "/gradio_api/stream/1", "/gradio_api/deep_link", "/monitoring", "/gradio_api/vibe-edit",
        "/gradio_api/dev/reload", "/gradio_api/runs", "/gradio_api/mcp/sse",
    ],
)  # fmt: skip
def test_closed_paths_never_reach_the_app(path: str) -> None:
    status, _, body, seen = request(path)
    assert (status, seen) == (404, None)
    assert json.loads(body)["error"]["code"] == "path_closed"
    assert not passes(path=path, method="POST")


@pytest.mark.parametrize(
    "path",
    [
        "/", "/config", "/gradio_api/queue/data", "/gradio_api/run/send", "/assets/Upload-x1.js",
        "/assets/file.js", "/gradio_api/file=/tmp/gradio/a b.png", "/gradio_api/file=C:/Users/a/b.png",
        "/static/img/logo.svg", "/theme.css", "/中文", "/en/", "/gradio_api/heartbeat/100%25",
    ],
)  # fmt: skip
def test_what_the_page_needs_is_open(path: str) -> None:
    assert path_open(path)


def test_bodies_are_json_of_known_and_bounded_length() -> None:
    def status(**extra: str) -> int:
        named = {name.replace("_", "-"): value for name, value in extra.items()}
        return int(request("/api", "POST", extra=named)[0])

    json_type = "application/json; charset=utf-8"
    assert status(content_type=json_type, content_length="1000") == 200
    assert status(content_type=json_type, content_length="1001") == 413
    assert status(content_type=json_type, content_length="-5") == 411
    assert status(content_type=json_type, transfer_encoding="chunked") == 411
    assert status(content_type="text/plain", content_length="5") == 415
    assert status(content_type="multipart/form-data; boundary=x", content_length="5") == 415
    assert status(content_length="5") == 415


def test_answers_carry_our_headers_and_no_cors() -> None:
    _, headers, body, _ = request("/config", extra={"origin": "http://127.0.0.1:7860"})
    assert body == PAGE
    assert not [name for name in headers if name.lower().startswith((b"access-control", b"server"))]
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert headers[b"x-frame-options"] == b"DENY"
    assert headers[b"referrer-policy"] == b"no-referrer"
    assert headers[b"cache-control"] == b"max-age=60"
    policy = headers[b"content-security-policy"].decode()
    for part in (
        "img-src 'self' data: blob:;",
        "connect-src 'self';",
        "frame-ancestors 'none'",
        "object-src 'none'",
    ):
        assert part in policy


def test_a_page_may_run_its_own_inline_scripts_and_no_other() -> None:
    _, headers, body, _ = request("/")
    assert body == PAGE
    scripts = headers[b"content-security-policy"].decode().split("script-src")[1].split(";")[0]
    own = base64.b64encode(hashlib.sha256(b"go()").digest()).decode()
    assert f"'sha256-{own}'" in scripts
    assert "unsafe-inline" not in scripts
    assert scripts.count("sha256-") == 1
    assert "sha256" not in content_policy()


def test_forwarded_headers_do_not_reach_the_app() -> None:
    extra = {
        "x-forwarded-host": "evil",
        "forwarded": "host=evil",
        "x-forwarded-proto": "https",
        "x-mine": "1",
    }
    seen = request("/config", extra=extra)[3]
    assert {name for name, _ in seen["headers"]} == {b"host", b"x-mine"}


def test_a_refusal_speaks_the_readers_language_and_reveals_nothing() -> None:
    foreign = [("host", "<script>:7860")]
    extra = {"accept": "text/html", "accept-language": "zh-CN,zh;q=0.9"}
    _, headers, body, _ = request(pairs=foreign, extra=extra)
    assert headers[b"content-type"].startswith(b"text/html")
    assert "地址" in body.decode()
    assert b"<script>" not in body
    assert b"frame-ancestors 'none'" in headers[b"content-security-policy"]
    assert request(method="HEAD", pairs=foreign)[2] == b""


def test_lifespan_passes_untouched() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    asyncio.run(Guard(app, ())({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == [{"type": "lifespan"}]
