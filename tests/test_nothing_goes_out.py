"""The whole app, started and visited: it listens on this computer alone, and asks nobody anything.

The interpreter itself reports every connection and every name looked up (audit events), so this needs
no privileges. What the page makes the browser do is watched by the browser tests.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import urljoin

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
WATCHED = """
import sys
report = open(sys.argv.pop(1), "a", buffering=1)
EVENTS = {"socket.connect": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}

def watch(event, values):
    if event in EVENTS:
        print(event, repr(values[EVENTS[event]]), file=report)

sys.addaudithook(watch)
if __name__ == "__main__":
    from glmui.cli import main
    sys.exit(main())
"""


def get(port: int, path: str) -> bytes:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", path, headers={"Accept": "text/html"})
        return connection.getresponse().read()


def wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if json.loads(get(port, "/glmui/whoami"))["ready"]:
                return
        except OSError:
            pass
        time.sleep(0.05)
    pytest.fail("the app did not come up")


@pytest.mark.slow
def test_a_start_and_a_visit(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    report = tmp_path / "report"
    flags = ["--no-browser", "--model", "echo", "--port", str(port), "--data-dir", str(tmp_path / "data")]
    process = subprocess.Popen([sys.executable, "-c", WATCHED, str(report), *flags], cwd=ROOT)
    try:
        wait_until_ready(port)
        page = get(port, "/").decode()
        for link in re.findall(r'(?:src|href)="([^"]+)"', page):
            if not link.startswith(("http", "data:", "//")):
                get(port, urljoin("/", link))
        listening = [
            one.laddr for one in psutil.Process(process.pid).net_connections() if one.status == "LISTEN"
        ]
        assert [(address.ip, address.port) for address in listening] == [("127.0.0.1", port)]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)
    assert "gradio_config" in page
    asked = report.read_text().splitlines()
    assert asked  # binding looks up its own address, so something is always reported
    assert not [line for line in asked if "127.0.0.1" not in line]
