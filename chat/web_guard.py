"""What stands before Gradio: only the requests of the page itself pass, and the page may load nothing from elsewhere.

Gradio answers far more than one page needs: uploads, files, a proxy, its own interface for programs. None of that is
reachable here. The browser in turn is told to fetch nothing from any other machine, whatever the page holds.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 4 * 2**20  # bytes; a question with all that Gradio sends around it
_READ = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|login_check|logout)/?"
    r"|/(assets|static|svelte)/[^?]+"
    r"|/gradio_api/(info|theme\.css|login_check|startup-events|app_id)/?"
    r"|/gradio_api/heartbeat/\w+|/gradio_api/queue/data"
)
_WRITE = re.compile(r"/login/?|/gradio_api/queue/join|/gradio_api/cancel|/gradio_api/reset|/gradio_api/run/predict")
_LOCAL = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)
_HEADERS = {
    # Gradio's page has scripts in itself and makes functions of its templates; images may be data.
    "content-security-policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; "
    "base-uri 'self'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class Guard:
    """ASGI middleware; ``only_local`` admits requests that name this machine and come from its own pages.

    ``end`` tells Gradio that every client has gone: its event streams would keep the server from ending.
    """

    def __init__(self, app: ASGIApp, *, only_local: bool) -> None:
        self._app = app
        self._only_local = only_local
        self._ending = asyncio.Event()

    def end(self) -> None:
        self._ending.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # an unanswered web socket is closed by the server
        refusal = self._refusal(scope)
        if refusal is not None:
            await _refuse(send, *refusal)
            return

        has_more = False

        async def send_guarded(message: Message) -> None:
            nonlocal has_more
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_encoded(_HEADERS.items())]
                has_more = True
            elif message["type"] == "http.response.body":
                has_more = message.get("more_body", False)
            await send(message)

        await self._app(scope, partial(self._receive, receive), send_guarded)
        if has_more and self._ending.is_set():
            await send({"type": "http.response.body", "body": b""})

    async def _receive(self, receive: Receive) -> Message:
        message = asyncio.ensure_future(receive())
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait((message, ending), return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else {"type": "http.disconnect"}
        finally:
            ending.cancel()
            message.cancel()

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and sentence for what may not pass."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self._only_local and not _is_local(headers):
            return 403, "This page is for its own machine: open it as http://127.0.0.1."
        paths = _READ if scope["method"] in ("GET", "HEAD") else _WRITE if scope["method"] == "POST" else None
        if paths is None or not paths.fullmatch(scope["path"]):
            return 404, "There is nothing here."
        length = headers.get("content-length", "")
        if scope["method"] == "POST" and not (length.isdecimal() and int(length) <= LARGEST_BODY):
            return 413, "This is too long."
        return None


def _is_local(headers: dict[str, str]) -> bool:
    origin = headers.get("origin")
    return bool(_LOCAL.fullmatch(headers.get("host", ""))) and (
        origin is None or origin.partition("://")[2] == headers["host"]
    )


async def _refuse(send: Send, status: int, sentence: str) -> None:
    headers = _encoded([("content-type", "text/plain; charset=utf-8"), *_HEADERS.items()])
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": sentence.encode() + b"\n"})


def _encoded(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers]
