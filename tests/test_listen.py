"""Which port the page gets, and what is said when it gets none."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from glmui import listen
from glmui.errors import InvalidInput


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> int:
    """The first of a few free ports, taken as glmui's own range."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        first = int(probe.getsockname()[1])
    monkeypatch.setattr(listen, "FIRST_PORT", first)
    monkeypatch.setattr(listen, "PORTS_TRIED", 3)
    return first


@contextmanager
def answering(port: int, body: bytes) -> Iterator[None]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield
        server.shutdown()
        thread.join()


def port_of(found: socket.socket | listen.Running) -> int:
    assert isinstance(found, socket.socket)
    with found:
        return int(found.getsockname()[1])


def test_the_usual_port_then_the_next_free_one(ports: int, tmp_path: Path) -> None:
    assert port_of(listen.listen("127.0.0.1", None, tmp_path)) == ports
    with answering(ports, b"something else"):
        assert port_of(listen.listen("127.0.0.1", None, tmp_path)) == ports + 1


def test_a_named_port_is_that_port_or_an_error(ports: int, tmp_path: Path) -> None:
    assert port_of(listen.listen("127.0.0.1", ports + 2, tmp_path)) == ports + 2
    with answering(ports, b"[]"), pytest.raises(InvalidInput) as raised:
        listen.listen("127.0.0.1", ports, tmp_path)
    assert raised.value.code == "port_taken"
    assert str(ports) in raised.value.message("zh")


def test_no_port_left(ports: int, tmp_path: Path) -> None:
    with (
        answering(ports, b""),
        answering(ports + 1, b""),
        answering(ports + 2, b""),
        pytest.raises(InvalidInput) as raised,
    ):
        listen.listen("127.0.0.1", None, tmp_path)
    assert raised.value.code == "no_free_port"


@pytest.mark.parametrize("named", [True, False])
def test_glmui_itself_is_recognised(ports: int, tmp_path: Path, named: bool) -> None:
    identity = json.dumps(listen.whoami(tmp_path, ready=True)).encode()
    with answering(ports, identity):
        found = listen.listen("127.0.0.1", ports if named else None, tmp_path)
    assert found == listen.Running(ports)


def test_glmui_with_another_data_folder_is_another_program(ports: int, tmp_path: Path) -> None:
    identity = json.dumps(listen.whoami(tmp_path / "other", ready=True)).encode()
    with answering(ports, identity):
        assert port_of(listen.listen("127.0.0.1", None, tmp_path)) == ports + 1


def test_an_address_of_some_other_machine(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as raised:
        listen.listen("192.0.2.1", 18999, tmp_path)
    assert raised.value.code == "bad_host"
    assert "192.0.2.1" in str(raised.value)


def test_a_name_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(InvalidInput, match="Name or service not known"):
        listen.listen("nowhere", 18999, tmp_path)


def test_what_identifies_glmui_names_no_folder(tmp_path: Path) -> None:
    assert str(tmp_path) not in json.dumps(listen.whoami(tmp_path, ready=True))


@pytest.mark.parametrize(
    ("host", "page"),
    [
        ("127.0.0.1", "http://127.0.0.1:7860/"),
        ("localhost", "http://localhost:7860/"),
        ("::1", "http://[::1]:7860/"),
        ("0.0.0.0", "http://127.0.0.1:7860/"),
        ("::", "http://[::1]:7860/"),
    ],
)
def test_the_address_can_be_opened(host: str, page: str) -> None:
    assert listen.address(host, 7860) == page
