"""The endpoints: OpenAI's, vLLM's for adapters, health, metrics, and the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from molora.serve.answers import Format, Piece, joined
from molora.serve.engine import EngineError
from molora.serve.events import EventStream
from molora.serve.gate import Gate, refusal
from molora.serve.page import page_response
from molora.serve.protocol import ApiError, ChatRequest, CompletionRequest, ErrorBody, LoadRequest, UnloadRequest, parse
from molora.serve.server import Body, Server

TEXT: Any = {200: {"description": "Text", "content": {"text/plain": {}}}}
STREAMED: Any = {200: {"description": "The answer, whole or as events", "content": {"text/event-stream": {}}}}

READ_S = 10.0
"""What a client may need for reading a stream beyond the time that its answer may take."""


def create_app(server: Server, drain_s: float = 30.0) -> FastAPI:
    """The application around a server; it starts the engine, and on shutdown lets running requests finish."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.engine.start()
        yield
        await server.engine.stop(drain_s)

    errors: Any = {kind: {"description": "An error", "model": ErrorBody} for kind in ("4XX", "5XX")}
    app = FastAPI(title="molora", lifespan=lifespan, docs_url=None, redoc_url=None, responses=errors)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _refused)
    app.add_middleware(Gate, server=server)

    @app.post("/v1/chat/completions", openapi_extra=_body(ChatRequest), responses=STREAMED)
    async def chat_completions(request: Request) -> Response:
        return await _complete(server, request, parse(ChatRequest, await _read(request, server)))

    @app.post("/v1/completions", openapi_extra=_body(CompletionRequest), responses=STREAMED)
    async def completions(request: Request) -> Response:
        return await _complete(server, request, parse(CompletionRequest, await _read(request, server)))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.card(name) for name in server.model_names]}

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> dict[str, Any]:
        server.check_model(model)
        return server.card(model)

    @app.post("/v1/load_lora_adapter", openapi_extra=_body(LoadRequest), response_class=Response, responses=TEXT)
    async def load_lora_adapter(request: Request) -> Response:
        _changes_allowed(server)
        body = parse(LoadRequest, await _read(request, server))
        await server.pool.load(body.lora_name, body.lora_path, body.examples)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", openapi_extra=_body(UnloadRequest), response_class=Response, responses=TEXT)
    async def unload_lora_adapter(request: Request) -> Response:
        _changes_allowed(server)
        body = parse(UnloadRequest, await _read(request, server))
        await server.pool.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @app.get("/health")
    async def health() -> Response:
        error = server.engine.error
        return JSONResponse({"status": "ok"} if error is None else {"status": error}, 200 if error is None else 503)

    @app.get("/metrics", response_class=Response, responses=TEXT)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return page_response()

    return app


async def _complete(server: Server, request: Request, body: Body) -> Response:
    """One request of either kind, for each of its prompts."""
    server.check_count(body)
    prompts = await asyncio.to_thread(server.prompts, body)  # a long text takes seconds, and others are being answered
    asked = [server.request(body, ids) for ids in prompts]
    routed = {None: None, False: None, True: "mean"}.get(body.routed_experts, "layers")  # type: ignore[arg-type]
    chat = isinstance(body, ChatRequest)
    form = Format(body.model, chat, routed, server.engine.tracer)
    read = sum(map(len, prompts))
    answers = [server.answer(one, body.stops) for one in asked]
    if not body.stream and body.stream_options is not None:
        raise ApiError(400, "stream_options goes with stream: true", "stream_options")
    with ExitStack() as places:
        try:
            places.enter_context(server.engine.places(len(asked)))
        except EngineError as error:
            raise ApiError(error.status, str(error)) from error
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            longest = server.engine.limits.timeout_s + READ_S
            return EventStream(form, answers, read if with_usage else None, places.pop_all(), longest)
        return JSONResponse(form.whole(await _unless_left(request, _all_collected(answers)), read))


async def _collected(answer: AsyncIterator[Piece]) -> Piece:
    return joined([piece async for piece in answer])


async def _all_collected(answers: Sequence[AsyncIterator[Piece]]) -> list[Piece]:
    """Where one fails, the others are cancelled: nobody waits for them."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_collected(answer)) for answer in answers]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _unless_left(request: Request, work: Any) -> Any:
    """What `work` returns; it is cancelled when the client hangs up."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client hung up")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _read(request: Request, server: Server) -> bytes:
    """The body, as long as it may be and take."""
    limits = server.engine.limits
    parts, size, most = [], int(request.headers.get("content-length", 0)), limits.max_body_bytes
    try:
        async with asyncio.timeout(limits.body_s):
            if size <= most:
                size = 0
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > most:
                        break
    except TimeoutError:
        raise ApiError(408, f"the body took more than {limits.body_s:g} seconds") from None
    except ClientDisconnect:
        raise ApiError(499, "the client hung up") from None
    if size > most:
        raise ApiError(413, f"the body has more than {most:,} bytes")
    return b"".join(parts)


def _changes_allowed(server: Server) -> None:
    if server.api_key is None:
        raise ApiError(403, "experts can be changed only where a key guards them; start the server with --api-key")


def _refused(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, ApiError):
        return refusal(error)
    if isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path[:200]}: {error.detail}"
        response = refusal(ApiError(error.status_code, what))
        response.headers.update(error.headers or {})  # of a 405, what is allowed
        return response
    return refusal(ApiError(500, "the server failed; its log says why"))


def _body(kind: type[BaseModel]) -> dict[str, Any]:
    """For the schema: bodies are read and checked by `parse`."""
    schema = kind.model_json_schema()
    parts = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, list):
            return [inline(one) for one in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:  # which would be looked for at the root of the whole document
            return inline(parts[value["$ref"].rpartition("/")[2]])
        return {key: inline(one) for key, one in value.items()}

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inline(schema)}}}}
