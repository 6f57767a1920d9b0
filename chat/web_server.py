"""Serve the page to browsers: on this machine alone, or to others with a password.

medcot serve runs/smollm2-cpu/gguf/smollm2-cpu-Q4_K_M.gguf
medcot serve base-Q4_K_M.gguf tuned-Q4_K_M.gguf --port 8000
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chat.proof import known_proof
from chat.safety import RedFlagWatch
from chat.terminal import open_model
from chat.web_conversation import WebModel, WebSettings, check_number
from pipeline.errors import MedcotError

if TYPE_CHECKING:
    import gradio as gr
    import uvicorn

    from chat.web_guard import Guard

SHORTEST_PASSWORD = 8  # characters
SECONDS_TO_END = 2  # for open connections, when the server ends


def serve(
    paths: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    password: str | None = None,
    n_ctx: int = 4096,
    max_new_tokens: int = 1024,
    thought_budget: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    threads: int | None = None,
    emergency_number: str | None = None,
    country: str | None = None,
    red_flags: Path | None = None,
    as_json: bool = False,
) -> None:
    """Serve a page with these models until interrupted. ``port`` 0 takes a free one.

    Raises MedcotError for a port that is taken, for a host other than this machine's own without a password, for red
    flag rules and for models that cannot be used.
    """
    if find_spec("gradio") is None:
        raise MedcotError("The page needs Gradio, which is not installed: pip install -r requirements-chat.txt.")
    check_number(len(paths))
    if password is not None and len(password) < SHORTEST_PASSWORD:
        raise MedcotError(f"The password has {len(password)} characters: take {SHORTEST_PASSWORD} or more.")
    with ExitStack() as stack:
        listener, is_loopback = listen(host, port)
        stack.enter_context(listener)
        if not is_loopback and password is None:
            raise MedcotError(
                f"{host} can be reached by others, so it needs a password: add --password, or set MEDCOT_PASSWORD."
            )
        watch = RedFlagWatch.load(red_flags, emergency_number, country)
        for path in paths:
            if known_proof(path) is None:
                click.echo(f"Checking {path.name}, because it is new here ...", err=True)
        loaded = [stack.enter_context(open_model(path, n_ctx, threads)) for path in paths]
        # Gradio takes seconds to import, so whatever is wrong above is told before.
        from chat.web import build_page

        settings = WebSettings(watch, max_new_tokens, thought_budget, temperature, top_p, seed)
        models = [WebModel(name, model) for name, model in zip(_names(paths), loaded, strict=True)]
        page = stack.enter_context(build_page(models, settings))
        url = url_of(listener)
        if as_json:
            click.echo(json.dumps({"url": url, "models": [model.name for model in models]}))
        else:
            click.echo(f"Open {url} in a browser; Ctrl-C ends.", err=True)
            if not is_loopback:
                click.echo("It is not encrypted: serve it in a network you trust, or behind a TLS proxy.", err=True)
        run_server(page_app(page, password=password, only_local=is_loopback), listener)


def page_app(page: gr.Blocks, *, password: str | None = None, only_local: bool = False) -> Guard:
    """The page as an ASGI application that answers the page's own requests and no others.

    ``only_local`` also refuses requests that name another host: a web site elsewhere could make its visitor's browser
    send them here.
    """
    import gradio as gr
    from fastapi import FastAPI

    from chat.web import STYLE, THEME
    from chat.web_guard import Guard

    # FastAPI would send measurements where the environment says so.
    quiet: dict[str, Any] = {"telemetry": {"auto_configure": False}}
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None, **quiet),
        page,
        path="/",
        app_kwargs=quiet,
        auth=None if password is None else lambda _, given: _is_same(given, password),
        auth_message="Any name will do; the password is the one this server was started with.",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        max_file_size=0,
        theme=THEME,
        css=STYLE,
    )
    return Guard(app, only_local=only_local)


def run_server(app: Guard, listener: socket.socket) -> None:
    """Answer requests until interrupted."""
    with suppress(KeyboardInterrupt):
        new_server(app).run(sockets=[listener])


def new_server(app: Guard) -> uvicorn.Server:
    """A server that ends at once, however many pages are open, when ``should_exit`` is set or it is interrupted."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.end()
            await super().shutdown(sockets)

    return Server(server_config(app))


def server_config(app: Any) -> uvicorn.Config:
    """How both the page and the API are served: quietly, and ended in SECONDS_TO_END."""
    import uvicorn

    return uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_END, server_header=False)


def listen(host: str, port: int) -> tuple[socket.socket, bool]:
    """A listening socket, and whether only this machine reaches it; raises MedcotError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise MedcotError(f"There is no host {host!r}: name this machine's own address, such as 0.0.0.0.") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise MedcotError(
            f"Port {port} of {host} cannot be taken ({error.strerror}): name another with --port, or 0 for a free one."
        ) from error
    return listener, ipaddress.ip_address(str(address[0])).is_loopback


def _is_same(given: str, password: str) -> bool:
    return hmac.compare_digest(given.encode(), password.encode())


def _names(paths: Sequence[Path]) -> list[str]:
    """The files' names, or their paths where two are called the same."""
    names = [path.stem for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def url_of(listener: socket.socket) -> str:
    address, port, *_ = listener.getsockname()
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
