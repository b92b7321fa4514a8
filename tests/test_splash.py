"""The first page, and the hand-over of its socket to the app."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from glmui import listen
from glmui.security import allowed_hosts
from glmui.splash import Splash, page


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def splash(listener: socket.socket, tmp_path: Path) -> Iterator[Splash]:
    hosts = allowed_hosts(listener.getsockname()[1])
    splash = Splash(listener, hosts, listen.whoami(tmp_path, ready=False))
    yield splash
    splash.stop()


def ask(
    listener: socket.socket, path: str = "/", method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(*listener.getsockname(), timeout=5)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


@pytest.mark.usefixtures("splash")
def test_the_page_comes_in_the_readers_language(listener: socket.socket) -> None:
    status, headers, body = ask(listener, Accept_Language="zh-CN,zh;q=0.9,en;q=0.8")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "正在启动" in body.decode()
    assert 'lang="zh"' in body.decode()
    assert "Starting" in ask(listener, Accept_Language="de")[2].decode()


def test_the_language_that_was_set_wins(listener: socket.socket, tmp_path: Path) -> None:
    port = listener.getsockname()[1]
    splash = Splash(listener, allowed_hosts(port), listen.whoami(tmp_path, ready=False), "zh")
    assert "正在启动" in ask(listener, Accept_Language="en")[2].decode()
    splash.stop()


def test_the_page_needs_nothing_from_elsewhere_and_no_placeholder_is_left() -> None:
    for language in ("en", "zh"):
        text = page(language).decode()
        assert "//" not in text.replace("// The page", "")
        assert "$" not in text


@pytest.mark.usefixtures("splash")
def test_the_policy_allows_the_pages_script_alone(listener: socket.socket) -> None:
    policy = ask(listener)[1]["Content-Security-Policy"]
    assert policy.count("sha256-") == 1
    assert "frame-ancestors 'none'" in policy


@pytest.mark.usefixtures("splash")
def test_it_can_be_recognised(listener: socket.socket, tmp_path: Path) -> None:
    identity = json.loads(ask(listener, listen.WHOAMI)[2])
    assert (identity["app"], identity["ready"]) == ("glmui", False)
    assert listen.is_running("127.0.0.1", listener.getsockname()[1], tmp_path)


@pytest.mark.usefixtures("splash")
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/"),
        ("PUT", "/"),
        ("DELETE", "/"),
        ("OPTIONS", "/"),
        ("GET", "/v1/models"),
        ("POST", "/gradio_api/run/x"),
    ],
)
def test_everything_else_is_told_to_come_back(listener: socket.socket, method: str, path: str) -> None:
    status, headers, body = ask(listener, path, method, b"x" * 200_000 if method == "POST" else None)
    assert (status, headers["Retry-After"]) == (503, "1")
    assert json.loads(body)["error"]["code"] == "starting"


@pytest.mark.usefixtures("splash")
def test_a_foreign_host_is_refused(listener: socket.socket) -> None:
    assert ask(listener, Host="evil.example")[0] == 403
    assert ask(listener, listen.WHOAMI, Host="evil.example")[0] == 403


def test_a_silent_connection_holds_nobody_up(listener: socket.socket, splash: Splash) -> None:
    with socket.create_connection(listener.getsockname()):
        assert ask(listener)[0] == 200
        splash.stop()
    splash.stop()  # again: nothing happens


def test_no_request_fails_across_the_hand_over(listener: socket.socket, splash: Splash) -> None:
    answers: list[bytes] = []
    failures: list[Exception] = []
    seen_splash, seen_app, enough = threading.Event(), threading.Event(), threading.Event()

    def poll() -> None:
        while not enough.is_set():
            try:
                answers.append(ask(listener)[2])
            except Exception as error:
                failures.append(error)
            (seen_app if answers and answers[-1] == b"app" else seen_splash).set()

    async def app(scope: dict[str, str], receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"app"})  # type: ignore[operator]

    pollers = [threading.Thread(target=poll) for _ in range(3)]
    for poller in pollers:
        poller.start()
    assert seen_splash.wait(5)
    splash.stop()
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", access_log=False))
    serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    serving.start()
    assert seen_app.wait(5)
    enough.set()
    for poller in pollers:
        poller.join()
    server.should_exit = True
    serving.join()
    assert not failures
    assert {answer[:9] for answer in answers} == {b"<!doctype", b"app"}
