"""The page on the server: built once for each language, the visitor's language served at "/"."""

from __future__ import annotations

from http.cookies import CookieError, SimpleCookie
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from glmui import __version__, i18n
from glmui.ui import page
from glmui.ui.desk import Desk
from glmui.ui.theme import theme

ASSETS = Path(__file__).resolve().parents[2] / "assets"


def mount(app: FastAPI, desk: Desk) -> None:
    """Add the page to `app`: /en and /zh hold a copy each, and "/" shows the one the visitor reads.

    Call it last: it answers every path that nothing else answers.
    """
    style = (ASSETS / "glmui.css").read_text(encoding="utf-8")
    for language in i18n.LANGUAGES:
        gr.mount_gradio_app(
            app,
            page.build(desk, language, ASSETS),
            f"/{language}",
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size="1kb",  # the page takes no files
            theme=theme(),
            css=style,
            head=f'<script src="/glmui/assets/glmui.js?{language}-{__version__}"></script>',
        )
    app.mount("/glmui/assets", StaticFiles(directory=ASSETS))
    app.add_api_route("/manifest.json", _manifest)
    app.add_api_route("/favicon.ico", _icon)
    app.mount("/", _FrontDoor(app, desk))


async def _manifest() -> JSONResponse:
    """What a phone needs to keep the page like an app."""
    icons = [{"src": "/favicon.ico", "sizes": "any", "type": "image/svg+xml"}]
    return JSONResponse(
        {"name": "glmui", "short_name": "glmui", "start_url": "/", "display": "standalone", "icons": icons},
        media_type="application/manifest+json",
    )


async def _icon() -> FileResponse:
    return FileResponse(ASSETS / "icon.svg", media_type="image/svg+xml")


class _FrontDoor:
    """Sends what was asked of "/" to the copy in the visitor's language.

    The copy tells the browser its own address (/en or /zh), so that a tab keeps its language
    whatever other tabs choose.
    """

    def __init__(self, app: ASGIApp, desk: Desk) -> None:
        self._app = app
        self._desk = desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if scope["type"] != "http" or path.split("/")[1] in i18n.LANGUAGES:
            await JSONResponse({"detail": "Not Found"}, 404)(scope, receive, send)
            return
        there = f"/{self._language(scope)}"
        raw = there.encode() + scope.get("raw_path", path.encode())
        await self._app({**scope, "path": there + path, "raw_path": raw, "root_path": ""}, receive, send)

    def _language(self, scope: Scope) -> str:
        """The cookie of the switch, else the setting, else the browser's wish."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        try:
            cookie = SimpleCookie(headers.get(b"cookie", "")).get("glmui_language")
        except CookieError:
            cookie = None
        if cookie and cookie.value in i18n.LANGUAGES:
            return cookie.value
        return self._desk.choice.settings.language or i18n.pick(headers.get(b"accept-language"))
