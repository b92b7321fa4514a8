"""Asking a server over HTTP, by rules of our own.

Built on httpx and not on huggingface_hub: that one speaks to one hub only, checks no hash after a download,
and leaves no say in redirects, stalls and proxies, which are most of what goes wrong. Two answers of a hub's
API are needed, the list of files and a file; both are plain enough.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import ssl
import urllib.request
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from glmui import __version__
from glmui.errors import FetchError
from glmui.hub.sources import Source

_MOST_HOPS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_LISTING_BYTES = 8 << 20
_CONNECT_SECONDS = 10.0
_RECEIVE_BYTES = 3 << 17


class Trouble(Exception):
    """What a source did instead of answering.

    reason: short, and the same in every language ("HTTP 404", "timeout"). again: whether asking the same
    source once more may help. wait: seconds it asked to be left alone.
    """

    def __init__(self, reason: str, *, again: bool = True, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.again = again
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Answer:
    """The last answer of a chain of redirects, its body still to come.

    host: who gave it; at_home: that is the source itself. linked: the sha256 that the source stated on the
    way (X-Linked-ETag), or "".
    """

    response: httpx.Response
    host: str
    at_home: bool
    linked: str


class Web:
    """Asks servers, through the proxy that the environment names for each. To be closed."""

    def __init__(self, connections: int, silence_seconds: float) -> None:
        self._limits = httpx.Limits(
            max_connections=4 * connections, max_keepalive_connections=4 * connections
        )
        self._timeout = httpx.Timeout(
            silence_seconds, connect=min(_CONNECT_SECONDS, silence_seconds), pool=None
        )
        self._clients: dict[str | None, httpx.AsyncClient] = {}

    async def close(self) -> None:
        for client in self._clients.values():
            await client.aclose()

    async def read_json(self, url: str, source: Source) -> Any:
        """The JSON value at `url`. Raises Trouble."""
        async with self.get(url, source) as answer:
            if answer.response.status_code != 200:
                raise refusal(answer)
            text = b""
            async for block in answer.response.aiter_bytes():
                text += block
                if len(text) > _LISTING_BYTES:
                    raise Trouble("too long an answer", again=False)
        try:
            return json.loads(text)
        except ValueError as error:
            raise Trouble("HTML page" if text.lstrip()[:1] == b"<" else "no JSON") from error

    @contextlib.asynccontextmanager
    async def get(
        self,
        url: str,
        source: Source,
        headers: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Answer]:
        """Ask for `url`, following redirects. Raises Trouble, also while the body is read.

        tags: host -> ETag; a host that has one gets it as If-Range. The source's token goes to its own
        address alone. A redirect from https to http is refused.
        """
        try:
            async with contextlib.AsyncExitStack() as stack:
                yield await self._follow(stack, httpx.URL(url), source, headers or {}, tags or {})
        except (httpx.HTTPError, ssl.SSLError) as error:
            raise Trouble(_reason(error), again=not _is_certificate(error)) from error
        except httpx.InvalidURL as error:
            raise Trouble("bad redirect", again=False) from error

    async def _follow(
        self,
        stack: contextlib.AsyncExitStack,
        url: httpx.URL,
        source: Source,
        headers: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> Answer:
        home, linked = httpx.URL(source.address), ""
        for _ in range(_MOST_HOPS + 1):
            at_home = (url.scheme, url.netloc) == (home.scheme, home.netloc)
            asked = dict(headers)
            if at_home and source.token:
                asked["Authorization"] = f"Bearer {source.token}"
            if tag := tags.get(url.netloc.decode()):
                asked["If-Range"] = tag
            response = await self._send(url, asked)
            stack.push_async_callback(response.aclose)
            linked = linked or (response.headers.get("X-Linked-ETag", "").strip('"') if at_home else "")
            if response.status_code not in _REDIRECTS:
                return Answer(response, url.netloc.decode(), at_home, linked)
            await _drain(response)
            url = next_address(url, response.headers.get("Location", ""))
        raise Trouble("too many redirects", again=False)

    async def _send(self, url: httpx.URL, headers: Mapping[str, str]) -> httpx.Response:
        client = self._client(proxy_of(url))
        return await client.send(client.build_request("GET", url, headers=headers), stream=True)

    def _client(self, proxy: str | None) -> httpx.AsyncClient:
        if proxy not in self._clients:
            self._clients[proxy] = httpx.AsyncClient(
                transport=_transport(proxy, self._limits),
                timeout=self._timeout,
                trust_env=False,  # proxies are chosen here, for each address
                headers={"User-Agent": f"glmui/{__version__}", "Accept-Encoding": "identity"},
            )
        return self._clients[proxy]


def _transport(proxy: str | None, limits: httpx.Limits) -> httpx.AsyncHTTPTransport:
    """trust_env: SSL_CERT_FILE and SSL_CERT_DIR, for networks with certificates of their own."""
    try:
        return httpx.AsyncHTTPTransport(
            proxy=proxy, limits=limits, trust_env=True, socket_options=_socket_options()
        )
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        raise FetchError("proxy_unusable", proxy=str(proxy).rpartition("@")[2]) from error


def _socket_options() -> list[tuple[int, int, int]]:
    """A bounded receive buffer: what waits there unread is lost with the program.

    Linux lets it grow to many MB by itself, but cuts a wish down to rmem_max: where that is small, too
    small for far servers, it is left to grow.
    """
    try:
        granted = int(Path("/proc/sys/net/core/rmem_max").read_text()) >= _RECEIVE_BYTES
    except (OSError, ValueError):
        granted = True  # not Linux
    return [(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)] if granted else []


def proxy_of(url: httpx.URL) -> str | None:
    """The proxy that the environment (or the system) names for that address; never one for this computer."""
    if is_loopback(url.host) or urllib.request.proxy_bypass(url.host):
        return None
    named = urllib.request.getproxies()
    proxy = named.get(url.scheme) or named.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


async def _drain(response: httpx.Response) -> None:
    """Read a short body, so that the connection serves again; let go of a long one."""
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) < 1 << 16:
        await response.aread()
    await response.aclose()


def is_safe(address: str) -> bool:
    """Whether what comes from there cannot be changed on the way: HTTPS, or this computer itself."""
    url = httpx.URL(address)
    return url.scheme == "https" or is_loopback(url.host)


def next_address(url: httpx.URL, location: str) -> httpx.URL:
    """Where a redirect leads. Raises Trouble for one that is none, or that leaves https."""
    target = url.join(location)
    if not location or target.scheme not in ("http", "https") or not target.host:
        raise Trouble("bad redirect", again=False)
    if url.scheme == "https" and target.scheme == "http":
        raise Trouble("redirect from https to http", again=False)
    return target


def refusal(answer: Answer) -> Trouble:
    """The Trouble of a status that is none of the wanted ones.

    What the source itself denies stays denied; the host it sent us to may only find the address too old.
    """
    status = answer.response.status_code
    again = not answer.at_home or status in (408, 416, 425, 429) or status >= 500
    return Trouble(f"HTTP {status}", again=again, wait=_wait(answer.response.headers.get("Retry-After", "")))


def _wait(header: str) -> float:
    return min(float(header), 60.0) if header.isdecimal() else 0.0


def _reason(error: Exception) -> str:
    if _is_certificate(error):
        return "TLS certificate"
    if isinstance(error, httpx.TimeoutException):
        return "timeout"
    if isinstance(error, httpx.ProxyError):
        return "proxy"
    return "no connection" if isinstance(error, httpx.ConnectError) else "connection broken"


def _is_certificate(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False
