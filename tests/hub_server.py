"""A stand-in for the model hubs: a real HTTP server with their paths, failing on demand.

    with StandInHub({"zai-org/chatglm-6b-int4": folder}) as hub:
        Source("huggingface", "huggingface", hub.address)    # or "modelscope": both on one address
        settings: model_sources = hub.address                # a mirror that speaks Hugging Face's paths
        environment: HF_ENDPOINT=hub.address

`folder` holds the repository's files; whatever is put there later is served too. Files of 100,000 bytes and
more, and every .bin, .safetensors and .model file, are "LFS files": the hub answers with a redirect to
`hub.cdn` (another port under another host name), as the real ones do.

    hub.fault("cut", "pytorch_model.bin", times=3, after=50_000)  # the next three answers for that file
    hub.fault("503")           # the next answer for any file
    hub.fault("page", API)     # the next list of files
    hub.rate = 200_000     # bytes a second for each answer; 0: as fast as it goes
    hub.requests           # what was asked so far: Request(path, headers, port)
    hub.sent               # bytes of file contents sent so far

Faults, with times=0 until `hub.heal()`: cut, reset, stall (sends `after` bytes, then nothing), whole (200 for
206), etag (another ETag), content_range (a wrong one), flip (one byte), page (an HTML page), pointer (a Git
LFS pointer), short (less than asked, properly announced), empty (206 and nothing), hop (one more redirect,
to the other host), loop (redirects for ever), elsewhere (a redirect to `hub.elsewhere`), and any HTTP
status as a number.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

API = "/api"  # as a fault's path: the lists of files
LFS_BYTES = 100_000
LFS_SUFFIXES = (".bin", ".safetensors", ".model")
PAGE = b"<!DOCTYPE html><html><body><h1>Please sign in to this Wi-Fi</h1></body></html>"
CHUNK = 1 << 16


@dataclass(frozen=True)
class Request:
    path: str
    headers: Mapping[str, str]
    port: int


@dataclass
class Fault:
    kind: str
    path: str = ""  # "": any file
    times: int = 1  # 0: for ever
    after: int = 0  # bytes of the body that still come
    used: int = field(default=0, compare=False)


class StandInHub:
    def __init__(
        self, repos: Mapping[str, Path], aliases: Mapping[str, str] | None = None, redirects: bool = True
    ) -> None:
        """aliases: old name -> new name, answered with 307. redirects: LFS files come from another host."""
        self.repos = {name: Path(folder) for name, folder in repos.items()}
        self.aliases = dict(aliases or {})
        self.redirects = redirects
        self.reset()
        self._lock = threading.Lock()
        self._hashes: dict[tuple[str, int, int], tuple[str, str]] = {}
        self.closing = threading.Event()
        self._servers = [_Server(self), _Server(self)]
        self.port, self.cdn_port = (server.server_address[1] for server in self._servers)
        self.address = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.cdn_port}"

    def reset(self) -> None:
        """As if nobody had asked anything yet."""
        self.requests: list[Request] = []
        self.tally = [0]  # a new one each time: an answer to an earlier question counts no more
        self.rate = 0
        self.elsewhere = ""
        self.gated = False
        self._faults: list[Fault] = []

    @property
    def sent(self) -> int:
        return self.tally[0]

    def __enter__(self) -> StandInHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fault(self, kind: str, path: str = "", *, times: int = 1, after: int = 0) -> Fault:
        """Answer so for files whose path ends with `path`; the fault tells how often it was used."""
        made = Fault(kind, path, times, after)
        with self._lock:
            self._faults.append(made)
        return made

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()

    def asked(self, part: str) -> list[Request]:
        """The requests so far whose path has `part` in it."""
        return [request for request in self.requests if part in request.path]

    def take_fault(self, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                mine = path == fault.path if API in (path, fault.path) else path.endswith(fault.path)
                if mine and (not fault.times or fault.used < fault.times):
                    fault.used += 1
                    return fault
        return None

    def count(self, tally: list[int], number: int) -> None:
        with self._lock:
            tally[0] += number

    def hashes(self, file: Path) -> tuple[str, str]:
        """(sha256, git blob sha1) of a file; computed once for each of its states."""
        stat = file.stat()
        key = (str(file), stat.st_size, stat.st_mtime_ns)
        if key not in self._hashes:
            sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % stat.st_size)
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    sha256.update(block)
                    git.update(block)
            self._hashes[key] = (sha256.hexdigest(), git.hexdigest())
        return self._hashes[key]

    def file_of(self, sha256: str) -> Path | None:
        for folder in self.repos.values():
            for file in _files(folder):
                if self.hashes(file)[0] == sha256:
                    return file
        return None


def is_lfs(file: Path) -> bool:
    return file.suffix in LFS_SUFFIXES or file.stat().st_size >= LFS_BYTES


def commit_of(hub: StandInHub, folder: Path) -> str:
    """A commit's name that changes when a file does."""
    text = "".join(f"{file.name}{hub.hashes(file)[0]}" for file in _files(folder))
    return hashlib.sha1(text.encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: StandInHub) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to tell."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.hub
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What waits in here was not sent yet, though `sent` counts it: keep it small.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        self.hub.requests.append(Request(self.path, dict(self.headers.items()), port))
        with contextlib.suppress(ConnectionError, TimeoutError):
            self._route()

    def do_HEAD(self) -> None:
        self.do_GET()

    def _route(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(address.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        listing = "/revision/" in path or path.endswith("/repo/files")
        if listing and (fault := self.hub.take_fault(API)):
            self._plain_fault(fault.kind)
            return
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, path):
                answer(self, *match.groups(), **({"query": query} if pattern.startswith("/api") else {}))
                return
        self._status(404)

    # Hugging Face

    def _hf_model(self, repo: str, revision: str, query: dict[str, str]) -> None:
        folder = self._folder(repo)
        if folder is None:
            return
        siblings = []
        for file in _files(folder):
            sha256, git = self.hub.hashes(file)
            size = file.stat().st_size
            entry: dict[str, Any] = {"rfilename": file.relative_to(folder).as_posix()}
            if query.get("blobs") == "true":
                entry |= {"size": size, "blobId": git}
                if is_lfs(file):
                    entry["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
            siblings.append(entry)
        values = {"id": repo, "sha": commit_of(self.hub, folder), "gated": False, "siblings": siblings}
        self._json(values)

    def _hf_file(self, repo: str, revision: str, path: str) -> None:
        folder = self._folder(repo)
        if folder is None:
            return
        commit = commit_of(self.hub, folder)
        if not (folder / path).is_file():
            self._status(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            self._hub_file(folder / path, {"X-Repo-Commit": commit})

    def _folder(self, repo: str) -> Path | None:
        """The repository's folder, or None once a refusal is sent (what is missing looks private)."""
        if repo in self.hub.aliases:
            self._redirect(self.path.replace(repo, self.hub.aliases[repo], 1), 307)
        elif self.hub.gated and "Authorization" not in self.headers:
            self._status(401, {"X-Error-Code": "GatedRepo"})
        elif repo in self.hub.repos:
            return self.hub.repos[repo]
        else:
            self._status(401, {"X-Error-Code": "RepoNotFound"})
        return None

    # ModelScope

    def _ms_files(self, repo: str, query: dict[str, str]) -> None:
        if repo not in self.hub.repos:
            self._json({"Code": 10010205001, "Message": "model not found", "Success": False}, 404)
            return
        folder = self.hub.repos[repo]
        files = [
            {
                "Path": file.relative_to(folder).as_posix(),
                "Name": file.name,
                "Type": "blob",
                "Size": file.stat().st_size,
                "Sha256": self.hub.hashes(file)[0],
                "IsLFS": is_lfs(file),
                "Revision": commit_of(self.hub, folder),
            }
            for file in _files(folder)
        ]
        self._json({"Code": 200, "Data": {"Files": files}, "Message": "success", "Success": True})

    def _ms_file(self, repo: str, query: dict[str, str]) -> None:
        file = self.hub.repos.get(repo, Path("/nowhere")) / query.get("FilePath", "")
        if file.is_file():
            self._hub_file(file, {})
        else:
            self._json({"Code": 10990101003, "Message": "file not found", "Success": False}, 404)

    # contents

    def _hub_file(self, file: Path, headers: dict[str, str]) -> None:
        sha256, git = self.hub.hashes(file)
        if is_lfs(file) and self.hub.redirects:
            size = str(file.stat().st_size)
            headers = headers | {"X-Linked-Size": size, "X-Linked-ETag": f'"{sha256}"', "ETag": f'"{git}"'}
            self._redirect(f"{self.hub.cdn}/cdn/{sha256}?file={file.name}&signature=x", 302, headers)
        else:
            self._content(file, headers, f'"{sha256 if is_lfs(file) else git}"')

    def _cdn_file(self, sha256: str) -> None:
        file = self.hub.file_of(sha256)
        if file is None:
            self._status(404)
        else:
            self._content(file, {}, f'"{sha256[:32]}-8"')

    def _content(self, file: Path, headers: dict[str, str], etag: str) -> None:
        fault = self.hub.take_fault(file.name)
        kind = fault.kind if fault else ""
        if kind in ("hop", "loop", "elsewhere"):
            self._hop(kind)
        elif kind.isdecimal() or kind == "page":
            self._plain_fault(kind)
        elif kind == "pointer":
            oid = self.hub.hashes(file)[0]
            text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 1\n".encode()
            self._send(200, {"ETag": etag, "Content-Length": str(len(text))}, [text])
        else:
            self._ranged(file, headers, f'"{etag[1:-1]}-other"' if kind == "etag" else etag, fault)

    def _plain_fault(self, kind: str) -> None:
        if kind == "page":
            self._send(200, {"Content-Type": "text/html", "Content-Length": str(len(PAGE))}, [PAGE])
        else:
            self._status(int(kind))

    def _hop(self, kind: str) -> None:
        separator = "&" if "?" in self.path else "?"
        if kind == "elsewhere":
            self._redirect(self.hub.elsewhere, 302)
        elif kind == "loop":
            self._redirect(f"{self.path}{separator}again", 302)
        else:
            here = self.server.server_address[1] == self.hub.port
            host = self.hub.cdn if here else self.hub.address
            self._redirect(f"{host}{self.path}", 302)

    def _ranged(self, file: Path, headers: dict[str, str], etag: str, fault: Fault | None) -> None:
        kind, size = fault.kind if fault else "", file.stat().st_size
        wanted = _range(self.headers.get("Range", ""), size)
        if self.headers.get("If-Range", etag) != etag or kind == "whole":
            wanted = None
        if wanted and wanted[0] >= size:
            self._status(416, {"Content-Range": f"bytes */{size}"})
            return
        start, end = wanted or (0, size)
        headers = headers | {
            "ETag": etag,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if kind == "short":
            end = start + (end - start) // 2
        if wanted:
            shift = 1 if kind == "content_range" else 0
            headers["Content-Range"] = f"bytes {start + shift}-{end - 1 + shift}/{size}"
        if kind == "empty":
            self.close_connection = True
            end = start
        else:
            headers["Content-Length"] = str(end - start)
        self._send(206 if wanted else 200, headers, self._body(file, start, end, fault))

    def _body(self, file: Path, start: int, end: int, fault: Fault | None) -> Iterator[bytes]:
        kind, after = (fault.kind, fault.after) if fault else ("", 0)
        began, place = time.monotonic(), start
        with file.open("rb") as opened:
            opened.seek(start)
            while place < end:
                room = end - place
                if kind in ("cut", "reset", "stall"):
                    room = min(room, start + after - place)
                    if room <= 0:
                        self._break(kind)
                        return
                block = opened.read(min(CHUNK, room))
                if kind == "flip" and place == start:
                    block = bytes([block[0] ^ 1]) + block[1:]
                yield block
                place += len(block)
                if self.hub.rate:
                    self.hub.closing.wait(max(0, began + (place - start) / self.hub.rate - time.monotonic()))

    def _break(self, kind: str) -> None:
        self.close_connection = True
        if kind == "stall":
            self.hub.closing.wait(60)
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR) if kind != "reset" else self.connection.close()

    # answers

    def _send(self, status: int, headers: dict[str, str], body: Any) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        tally = self.hub.tally
        for block in body if self.command == "GET" else ():
            self.wfile.write(block)
            self.hub.count(tally, len(block))

    def _json(self, values: Any, status: int = 200) -> None:
        text = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _status(self, status: int, headers: dict[str, str] | None = None) -> None:
        self._send(status, {"Content-Length": "0", **(headers or {})}, [])

    def _redirect(self, target: str, status: int, headers: dict[str, str] | None = None) -> None:
        self._status(status, {"Location": target, **(headers or {})})


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, Any]] = [
    (rf"/api/models/{_REPO}/revision/([^/]+)", _Handler._hf_model),
    (rf"/api/v1/models/{_REPO}/repo/files", _Handler._ms_files),
    (rf"/api/v1/models/{_REPO}/repo", _Handler._ms_file),
    (r"/cdn/(\w+)", _Handler._cdn_file),
    (rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler._hf_file),
]


def _range(header: str, size: int) -> tuple[int, int] | None:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", header)
    if not match:
        return None
    return int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
