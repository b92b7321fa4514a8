"""Start, hand-over and end of the whole server, in a process of its own as users have it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pytest

from glmui import server

ROOT = Path(__file__).resolve().parent.parent

# Serves a tiny app under glmui's roof: argv is data folder, port, kind of app.
HOUSE = """
import asyncio, sys, time
from pathlib import Path
from glmui import server, settings

def build(settings):
    if sys.argv[3] == "gradio":
        server.import_gradio(settings)
        import gradio as gr
        with gr.Blocks() as blocks:
            gr.Textbox("hello")
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse, StreamingResponse
    app = FastAPI()

    async def endless():
        while True:
            yield b"."
            await asyncio.sleep(0.05)

    @app.get("/endless")
    async def stream():
        return StreamingResponse(endless())

    @app.get("/stuck")
    async def stuck():
        await asyncio.to_thread(time.sleep, 60)

    @app.get("/page")
    def page():
        return PlainTextResponse("app")

    if sys.argv[3] == "gradio":
        gr.mount_gradio_app(app, blocks, "/", run_history=False)
    if sys.argv[3] == "broken":
        from glmui.errors import StoreError
        raise StoreError("data_folder_unwritable", folder="x", detail="y")
    return server.House(app, lambda: Path(settings.data_dir, "closed").touch())

flags = {"data_dir": sys.argv[1], "port": int(sys.argv[2]), "browser": False}
try:
    sys.exit(server.serve(settings.load(**flags), "en", build))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def house(data: Path, port: int, kind: str = "plain", **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOUSE, str(data), str(port), kind],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@dataclass
class Answer:
    status: int
    headers: Message
    body: bytes


def get(port: int, path: str, **headers: str) -> Answer:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())


@contextmanager
def streaming(port: int) -> Iterator[None]:
    """An answer that goes on and on."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", "/endless")
        with connection.getresponse() as answer:
            assert answer.read(1) == b"."
            yield


def wait_for(port: int, ready: bool) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if json.loads(get(port, "/glmui/whoami").body)["ready"] is ready:
                return
        except OSError:
            pass
        time.sleep(0.02)
    pytest.fail("the server did not come up")


def seconds_to_end(process: subprocess.Popen[str], number: int) -> float:
    began = time.monotonic()
    process.send_signal(number)
    process.wait(10)
    return time.monotonic() - began


def test_from_the_address_line_to_a_clean_end(tmp_path: Path, port: int) -> None:
    with house(tmp_path, port) as process:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port}/" in process.stdout.readline()
        wait_for(port, ready=True)
        page = get(port, "/page")
        assert page.body == b"app"
        assert page.headers["X-Frame-Options"] == "DENY"
        assert page.headers["Server"] is None
        assert get(port, "/page", Host="evil.example").status == 403
        assert seconds_to_end(process, signal.SIGTERM) < 3
        assert process.returncode == 0
        assert process.communicate() == ("", "")
    assert (tmp_path / "closed").exists()
    assert "listens" in (tmp_path / "logs" / "glmui.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        *([pytest.param(signal.SIGHUP, marks=pytest.mark.slow)] if os.name == "posix" else []),
    ],
)
def test_open_answers_hold_nothing_up(tmp_path: Path, port: int, number: int) -> None:
    with house(tmp_path, port) as process:
        wait_for(port, ready=True)
        with streaming(port), streaming(port), streaming(port):
            assert seconds_to_end(process, number) < 3
        assert process.returncode == (130 if number == signal.SIGINT else 0)
        assert process.communicate()[1] == ""
    assert (tmp_path / "closed").exists()
    assert "Traceback" not in (tmp_path / "logs" / "glmui.log").read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_hangs_is_left_behind(tmp_path: Path, port: int) -> None:
    with house(tmp_path, port) as process:
        wait_for(port, ready=True)
        with closing(socket.create_connection(("127.0.0.1", port))) as connection:
            connection.sendall(f"GET /stuck HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            connection.settimeout(0.2)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            assert seconds_to_end(process, signal.SIGTERM) < 3
    assert (tmp_path / "closed").exists()


def test_ending_while_starting(tmp_path: Path, port: int) -> None:
    with house(tmp_path, port, "gradio") as process:
        wait_for(port, ready=False)
        assert seconds_to_end(process, signal.SIGTERM) < 3
        assert process.communicate()[1] == ""


def test_a_second_start_finds_the_first(tmp_path: Path, port: int) -> None:
    with house(tmp_path, port):
        wait_for(port, ready=True)
        with house(tmp_path, port) as second:
            out, err = second.communicate(timeout=10)
        assert (second.returncode, err) == (0, "")
        assert "already" in out
        with house(tmp_path / "other", port) as third:
            err = third.communicate(timeout=10)[1]
        assert "port_taken" in err


def test_a_start_that_fails_frees_the_port(tmp_path: Path, port: int) -> None:
    with house(tmp_path, port, "broken") as process:
        assert "StoreError" in process.communicate(timeout=20)[1]
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_gradio_under_the_roof(tmp_path: Path, port: int) -> None:
    deaf = {"GRADIO_SHARE": "True", "GRADIO_MCP_SERVER": "True", "GRADIO_ROOT_PATH": "/evil"}
    with house(tmp_path, port, "gradio", **deaf) as process:
        wait_for(port, ready=True)
        page = get(port, "/")
        body = page.body.decode()
        assert "gradio_config" in body
        assert "/evil" not in body
        assert (
            "unsafe-inline"
            not in page.headers["Content-Security-Policy"].split("script-src")[1].split(";")[0]
        )
        assert get(port, "/gradio_api/upload").status == 404
        assert get(port, "/config", Origin="http://evil.example").status == 403
        own = get(port, "/config", Origin=f"http://127.0.0.1:{port}")
        assert own.status == 200
        assert own.headers["Access-Control-Allow-Credentials"] is None
        assert seconds_to_end(process, signal.SIGTERM) < 3


def run_python(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


IMPORT = """
import inspect, os, sys
from pathlib import Path
from glmui import server, settings
before = inspect.getfile
server.import_gradio(settings.load(data_dir=sys.argv[1]))
assert inspect.getfile is before
print({name: value for name, value in os.environ.items() if name.startswith("GRADIO_")})
import gradio
print(gradio.TRIED if hasattr(gradio, "TRIED") else inspect.getfile(gradio.Textbox))
"""


def test_gradio_is_imported_quickly_and_nothing_stays_changed(tmp_path: Path) -> None:
    environment, file = run_python(IMPORT, str(tmp_path), GRADIO_SHARE="1").splitlines()
    assert "GRADIO_SHARE" not in environment
    assert "'GRADIO_ANALYTICS_ENABLED': 'False'" in environment
    assert str(tmp_path) in environment
    assert file.endswith("textbox.py")


def test_a_gradio_that_minds_is_imported_plainly(tmp_path: Path) -> None:
    package = tmp_path / "gradio"
    package.mkdir()
    (package / "__init__.py").write_text("from gradio.part import A\nTRIED = 'plainly'\n")
    (package / "part.py").write_text("import inspect\nclass A: pass\ninspect.getfile(A)\n")
    assert run_python(IMPORT, str(tmp_path), PYTHONPATH=str(tmp_path)).splitlines()[1] == "plainly"


def test_the_browser_never_gets_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def fail(page: str) -> bool:
        opened.append(page)
        raise webbrowser.Error("no")

    monkeypatch.setattr(webbrowser, "open", fail)
    monkeypatch.setattr(server, "has_desktop", lambda: True)
    server.open_browser("http://127.0.0.1:7860/").join(5)
    assert opened == ["http://127.0.0.1:7860/"]
    monkeypatch.setattr(server, "has_desktop", lambda: False)
    server.open_browser("http://127.0.0.1:7860/").join(5)
    assert len(opened) == 1


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="a desktop is always there")
def test_no_desktop_no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    assert not server.has_desktop()
    monkeypatch.setenv("DISPLAY", ":0")
    assert server.has_desktop()
