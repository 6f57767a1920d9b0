"""An OpenAI-compatible endpoint for one GGUF: llama-cpp-python's own server with medcot's prompts and thoughts.

    medcot serve --api FILE.gguf
    OpenAI(base_url="http://127.0.0.1:7860/v1", api_key="none").chat.completions.create(...)

The library's app loads the model, checks the API key and lets one request at a time have the model; the others wait.
Its routes are replaced: its /v1/chat/completions tokenizes the rendered template, so that a user's text can become a
control token, and knows nothing of thoughts. /v1/completions is the library's own behind a check of the request.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import click
import uvicorn
from anyio.streams.memory import MemoryObjectSendStream
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from llama_cpp import Llama
from llama_cpp.server.app import authenticate, create_app, create_completion, get_llama_proxy
from llama_cpp.server.settings import ModelSettings, ServerSettings
from llama_cpp.server.types import CreateCompletionRequest
from pydantic import ValidationError
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import iterate_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from chat.api_answer import Documents, Finished, Reply
from chat.api_request import Refusal, explain, parse_chat_request, parse_json_object, too_long
from chat.disclaimer import DISCLAIMER
from chat.proof import prove
from chat.safety import RedFlagWatch
from chat.session import LONGEST_TOKEN
from chat.turn import Piece
from chat.web_conversation import WebSettings
from chat.web_server import listen, server_config, url_of
from export.gguf_model import GgufModel
from pipeline.errors import MedcotError
from pipeline.hardware import usable_cores

LOCAL_NAMES = ["localhost", "127.0.0.1", "::1", "[::1]"]
LARGEST_BODY = 8 * 2**20  # bytes; far more text than any context takes
_CLIENT_GONE = 499  # nginx's status for a client that closed its request; nobody reads it


def build_app(
    path: Path,
    settings: WebSettings,
    *,
    n_ctx: int = 4096,
    threads: int | None = None,
    api_key: str | None = None,
    only_local: bool = False,
) -> FastAPI:
    """The app with the model loaded; of one process, one (the library keeps its model in a global).

    ``settings`` hold for requests that leave them open. ``only_local`` refuses requests that call the server by
    another name than this machine's own. Raises MedcotError for a file that cannot be served.
    """
    os.environ.pop("CONFIG_FILE", None)  # create_app would take everything from that file instead
    app = create_app(server_settings=_server_settings(api_key), model_settings=[_model_settings(path, n_ctx, threads)])
    # The library's routes, and documentation that loads its scripts from the network.
    app.router.routes.clear()
    # It allows any web page that a user has open to read the answers.
    app.user_middleware = [each for each in app.user_middleware if each.cls is not CORSMiddleware]
    if only_local:  # a site elsewhere whose name is made to point here would be a client like any other
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_NAMES)
    app.include_router(_Endpoint(path, settings).router())
    for kind in (MedcotError, HTTPException, Exception):
        app.add_exception_handler(kind, _error_document)
    return app


def serve_api(
    paths: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    api_key: str | None = None,
    n_ctx: int = 4096,
    threads: int | None = None,
    emergency_number: str | None = None,
    country: str | None = None,
    red_flags: Path | None = None,
    as_json: bool = False,
    **defaults: Any,
) -> None:
    """Serve until interrupted. ``port`` 0 takes a free one; ``defaults`` are the other fields of WebSettings.

    Raises MedcotError for a port that is taken, for a host other than this machine's own without a key, for red flag
    rules and for models that cannot be used.
    """
    if len(paths) != 1:
        raise MedcotError(f"The API serves one model, not {len(paths)}: name one GGUF.")
    (path,) = paths
    listener, is_loopback = listen(host, port)
    with listener:
        if not is_loopback and not api_key:
            raise MedcotError(
                f"{host} can be reached by others, so it needs a key: set MEDCOT_API_KEY to one of yours."
            )
        settings = WebSettings(RedFlagWatch.load(red_flags, emergency_number, country), **defaults)
        app = build_app(path, settings, n_ctx=n_ctx, threads=threads, api_key=api_key or None, only_local=is_loopback)
        url = f"{url_of(listener)}/v1"
        if as_json:
            click.echo(json.dumps({"url": url, "models": [path.stem]}))
        else:
            click.echo(f"{DISCLAIMER}\n{path.stem} answers at {url}; Ctrl-C ends.", err=True)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(server_config(app)).run(sockets=[listener])


class _Endpoint:
    """The routes, and the one model behind them."""

    def __init__(self, path: Path, settings: WebSettings) -> None:
        self._name = path.stem
        self._settings = settings
        self._model = GgufModel(path, llama=anyio.run(_loaded))
        self._created = int(path.stat().st_mtime)

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", dependencies=[Depends(authenticate)])
        router.add_api_route("/chat/completions", self.chat_completion, methods=["POST"], response_model=None)
        router.add_api_route("/completions", self.completion, methods=["POST"], response_model=None)
        router.add_api_route("/models", self.models, methods=["GET"])
        return router

    async def chat_completion(self, request: Request) -> Response:
        asked = parse_chat_request(await _json_body(request))
        # Tokenizing needs no turn, so a request that cannot be answered is refused without waiting for one.
        reply = await anyio.to_thread.run_sync(Reply, self._model, asked, self._settings)
        documents = Documents(self._name, asked, self._settings.watch)
        if asked.stream:
            sender, receiver = anyio.create_memory_object_stream[dict[str, str]](1)
            return EventSourceResponse(
                receiver, data_sender_callable=partial(_publish, sender, reply, documents), sep="\n"
            )
        finished: Finished | None = None
        async with _until_disconnect(request), _turn_of(reply) as events:
            async for event in events:
                if isinstance(event, Finished):
                    finished = event
        return Response(status_code=_CLIENT_GONE) if finished is None else JSONResponse(documents.completion(finished))

    async def completion(self, request: Request) -> Any:
        """Text goes on from a prompt as the library has it: its defaults, its sampling, control tokens recognised."""
        settings = parse_json_object(await _json_body(request))
        try:
            asked = CreateCompletionRequest.model_validate(settings)
        except ValidationError as error:
            raise explain(error, tuple(CreateCompletionRequest.model_fields)) from error
        if not isinstance(asked.prompt, str) or (asked.n or 1) > 1 or (asked.best_of or 1) > 1:
            raise Refusal("prompt takes one text, and n and best_of 1: this server answers one at a time.", "prompt")
        await anyio.to_thread.run_sync(self._check_prompt, asked.prompt)
        return await create_completion(request, asked)

    async def models(self) -> dict[str, Any]:
        model = {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "medcot",
            "medcot": {
                "context_length": self._model.n_ctx,
                "disclaimer": DISCLAIMER,
                # What stands in for the system message of a request without one.
                "system_prompt": self._model.chat_format.system,
            },
        }
        return {"object": "list", "data": [model]}

    def _check_prompt(self, prompt: str) -> None:
        """Raises Refusal for what the library would fail at."""
        n_ctx = self._model.n_ctx
        if len(prompt) > n_ctx * LONGEST_TOKEN:
            raise too_long(f"prompt has {len(prompt):,} characters", n_ctx, "prompt")
        try:
            length = len(self._model.tokenize_like_llama_cpp(prompt)) + 1  # the library adds a BOS
        except UnicodeEncodeError as error:
            raise Refusal("The prompt holds half a character (a lone surrogate): remove it.", "prompt") from error
        if length >= n_ctx:
            raise too_long(f"prompt takes {length} tokens", n_ctx, "prompt")


def _model_settings(path: Path, n_ctx: int, threads: int | None) -> ModelSettings:
    """Raises MedcotError for a file that llama.cpp cannot load."""
    trained_for = prove(path).context_length
    cores = threads or usable_cores()
    # The ordinary constructor would fill what is not named here from the environment (MODEL, SEED, LORA_PATH, ...).
    return ModelSettings.model_construct(
        model=str(path),
        n_ctx=min(n_ctx, trained_for or n_ctx),
        n_threads=cores,
        n_threads_batch=cores,
        logits_all=False,  # its default holds logits for every position: 2 GB for Llama 3 and 4096 tokens
        verbose=False,
    )


def _server_settings(api_key: str | None) -> ServerSettings:
    # Its default ends an answer under way when the next request arrives.
    return ServerSettings.model_construct(api_key=api_key, interrupt_requests=False)


async def _loaded() -> Llama:
    async with asynccontextmanager(get_llama_proxy)() as models:
        return models()


@asynccontextmanager
async def _turn_of(reply: Reply) -> AsyncIterator[AsyncIterator[Any]]:
    """Wait until no other request has the model, then have the reply's events; it ends with the block."""
    async with asynccontextmanager(get_llama_proxy)():
        with closing(reply.stream()) as events:
            yield iterate_in_threadpool(events)


async def _publish(sender: MemoryObjectSendStream[dict[str, str]], reply: Reply, documents: Documents) -> None:
    """Send an answer while it is made. A client that goes away cancels this, and with it the generation."""

    async def send(document: dict[str, Any]) -> None:
        await sender.send({"data": json.dumps(document)})

    async with sender:
        await send(documents.first_chunk())
        try:
            async with _turn_of(reply) as events:
                async for event in events:
                    if isinstance(event, Piece):
                        await send(documents.piece_chunk(event))
                    elif isinstance(event, Finished):
                        for chunk in documents.last_chunks(event):
                            await send(chunk)
        except (MedcotError, RuntimeError) as error:  # RuntimeError: llama.cpp could not decode
            await send(_error(str(error), "server_error"))
            return
        await sender.send({"data": "[DONE]"})


@asynccontextmanager
async def _until_disconnect(request: Request) -> AsyncIterator[None]:
    """Cancel the block when the client has gone."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        yield
        tasks.cancel_scope.cancel()


async def _json_body(request: Request) -> bytes:
    """Raises Refusal. A web page can send another type across origins without being asked whether it may."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refusal("Send the request as JSON, with the header Content-Type: application/json.", status=415)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise Refusal(f"The request has more than {LARGEST_BODY:,} bytes: shorten it.", status=413)
    return bytes(body)


async def _error_document(_: Request, error: Exception) -> JSONResponse:
    """Errors as OpenAI's clients read them."""
    match error:
        case Refusal():
            return JSONResponse(_error(str(error), param=error.parameter, code=error.code), error.status)
        case MedcotError():
            return JSONResponse(_error(str(error)), 400)
        case HTTPException(status_code=status):
            return JSONResponse(_error(str(error.detail)), status, headers=error.headers)
    return JSONResponse(_error("This is a fault of the server; its log says more.", "server_error"), 500)


def _error(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
