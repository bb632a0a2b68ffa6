"""The endpoints: OpenAI's, vLLM's for adapters, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from molora.serve.answers import Format, Piece, joined
from molora.serve.engine import EngineError
from molora.serve.page import page_response
from molora.serve.protocol import ApiError, ChatRequest, CompletionRequest, LoadRequest, UnloadRequest, parse
from molora.serve.server import Body, Server

log = logging.getLogger("molora.serve")


def create_app(server: Server, drain_s: float = 30.0) -> FastAPI:
    """The application around a server; it starts the engine, and on shutdown lets running requests finish."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.engine.start()
        yield
        await server.engine.stop(drain_s)

    app = FastAPI(title="molora", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.middleware("http")(_Gate(server))

    @app.post("/v1/chat/completions", openapi_extra=_body(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await _complete(server, request, parse(ChatRequest, await _read(request, server)))

    @app.post("/v1/completions", openapi_extra=_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await _complete(server, request, parse(CompletionRequest, await _read(request, server)))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        owned = {"object": "model", "created": server.created, "owned_by": "molora"}
        parent = {"max_model_len": server.engine.limits.max_model_len, "root": server.name}
        # molora's own: what a client may ask of it, so that nobody has to try.
        offers = {"chat": bool(server.tokenizer.chat_template), "routed_experts": server.engine.tracer.available}
        cards = [{"id": n, **owned, **parent, "kind": server.kind(n), **offers} for n in server.model_names]
        return {"object": "list", "data": cards}

    @app.post("/v1/load_lora_adapter", openapi_extra=_body(LoadRequest))
    async def load_lora_adapter(request: Request) -> Response:
        _changes_allowed(server)
        body = parse(LoadRequest, await _read(request, server))
        await server.pool.load(body.lora_name, body.lora_path, body.examples)
        return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.", media_type="text/plain")

    @app.post("/v1/unload_lora_adapter", openapi_extra=_body(UnloadRequest))
    async def unload_lora_adapter(request: Request) -> Response:
        _changes_allowed(server)
        body = parse(UnloadRequest, await _read(request, server))
        await server.pool.unload(body.lora_name)
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", media_type="text/plain")

    @app.get("/health")
    async def health() -> Response:
        error = server.engine.error
        return JSONResponse({"status": "ok"} if error is None else {"status": error}, 200 if error is None else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return page_response()

    return app


class _Gate:
    """Before every request: the key. After it: one line of the log, one count."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def __call__(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        began, path = time.perf_counter(), request.url.path
        if path.startswith("/v1/") and not self._has_key(request):
            error = ApiError(401, "a valid key is needed: Authorization: Bearer KEY", None, "invalid_api_key")
            response: Response = _error(error)
        else:
            response = await call_next(request)
        response.headers["X-Content-Type-Options"] = "nosniff"
        known = (
            path
            if path.startswith(("/v1/chat/", "/v1/completions", "/v1/models", "/v1/load", "/v1/unload"))
            else "other"
        )
        self.server.metrics.requests.labels(known, str(response.status_code)).inc()
        line = {"path": path, "status": response.status_code, "seconds": round(time.perf_counter() - began, 4)}
        log.info(json.dumps(line | {"open": self.server.engine.open}))
        return response

    def _has_key(self, request: Request) -> bool:
        if self.server.api_key is None:
            return True
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(key.encode(), self.server.api_key.encode())


async def _complete(server: Server, request: Request, body: Body) -> Response:
    """One request of either kind, for each of its prompts."""
    prompts = server.prompts(body)
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
            return _Stream(_events(form, answers, read, with_usage), places.pop_all())
        return JSONResponse(form.whole(await _unless_left(request, _all_collected(answers)), read))


class _Stream(StreamingResponse):
    """Events; however it ends, the answers are closed and their places given back."""

    def __init__(self, events: AsyncGenerator[str], places: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.events, self.places = events, places

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self.places:
            async with aclosing(self.events):
                await super().__call__(scope, receive, send)


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


async def _events(
    form: Format, answers: Sequence[AsyncGenerator[Piece]], prompt_tokens: int, with_usage: bool
) -> AsyncGenerator[str]:
    """Server-sent events; an error behind the first byte becomes an event of its own."""
    made = 0
    extra: dict[str, Any] = {"usage": None} if with_usage else {}
    first = form.first()
    if first is not None:
        yield _event(first | extra)
    try:
        async with aclosing(_merged(answers)) as pieces:
            async for index, piece in pieces:
                made += piece.tokens
                if piece.text or piece.routing or piece.finish_reason:
                    yield _event(form.chunk(index, piece) | extra)
    except ApiError as error:
        yield _event(error.body)
        return
    if with_usage:
        yield _event(form.last(prompt_tokens, made))
    yield "data: [DONE]\n\n"


async def _merged(answers: Sequence[AsyncGenerator[Piece]]) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of several answers as they come, each with its number."""
    if len(answers) == 1:
        async with aclosing(answers[0]) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def pump(index: int, answer: AsyncIterator[Piece]) -> None:
        try:
            async for piece in answer:
                queue.put_nowait((index, piece))
        except ApiError as error:
            queue.put_nowait(error)
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.ensure_future(pump(index, answer)) for index, answer in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, ApiError):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(request: Request, server: Server) -> bytes:
    """The body, as long as it may be."""
    parts, size, most = [], 0, server.engine.limits.max_body_bytes
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise ApiError(413, f"the body has more than {most:,} bytes")
        parts.append(part)
    return b"".join(parts)


def _changes_allowed(server: Server) -> None:
    if server.api_key is None:
        raise ApiError(403, "experts can be changed only where a key guards them; start the server with --api-key")


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _error(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers=headers)


def _refused(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    assert isinstance(error, ApiError)
    return _error(error)


def _body(kind: type[BaseModel]) -> dict[str, Any]:
    """For the schema: bodies are read and checked by `parse`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}
