"""The endpoints."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Protocol, TypeVar, cast

import mlx.core as mx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ...prompts.processor import Prompt
from .asking import Ask
from .body import read_body
from .chat import ChatWriter, read_chat
from .detecting import detection, read_detect, write_detect
from .errors import HttpError, as_http
from .gate import Gate, Log, error_response
from .page import show_page
from .responses import ResponsesWriter, read_responses, responses_event
from .running import Run, Update
from .service import Service

T = TypeVar("T")


class Writer(Protocol):
    """Makes the bodies of a protocol; see `ChatWriter`."""

    def whole(self) -> dict[str, Any]:
        """The whole response."""

    def begin(self) -> list[dict[str, Any]]:
        """The first events of a stream."""

    def news(self, update: Update) -> list[dict[str, Any]]:
        """Events for what has come of an answer."""

    def end(self) -> list[dict[str, Any]]:
        """The last events."""


def make_app(service: Service, log: Log) -> Starlette:
    """The ASGI app of a service."""
    endpoints = Endpoints(service)
    routes = [
        Route("/health", endpoints.health),
        Route("/metrics", endpoints.metrics),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{name:path}", endpoints.model),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/chat/completions/input_tokens", endpoints.chat_tokens, methods=["POST"]),
        Route("/v1/responses", endpoints.responses, methods=["POST"]),
        Route("/v1/responses/input_tokens", endpoints.responses_tokens, methods=["POST"]),
        Route("/v1/detect", endpoints.detect, methods=["POST"]),
    ]
    if service.options.page:
        routes.append(Route("/", show_page))
    middleware = [Middleware(Gate, service=service, log=log)]
    origins = service.options.cors_origins
    if origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=["*"],
        )  # fmt: skip
        middleware.insert(0, cors)
    handlers: Any = {404: _not_found, 405: _wrong_method}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


async def _not_found(request: Request, error: Exception) -> Response:
    return error_response(HttpError(404, f"there is no {request.url.path[:200]}", code="not_found"))


async def _wrong_method(request: Request, error: Exception) -> Response:
    path = request.url.path
    return error_response(HttpError(405, f"{path} takes no {request.method}", code="wrong_method"))


class Endpoints:
    """What the server answers to."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def health(self, request: Request) -> Response:
        """200 if it answers questions, 503 while it does not."""
        self.service.check_ready()
        return JSONResponse({"status": "ok", "model": self.service.name})

    async def metrics(self, request: Request) -> Response:
        """Counters for Prometheus."""
        service, worker = self.service, self.service.worker
        gauges = {
            "answers": ("answers under way or waiting", service.answers),
            "answers_active": ("answers that grow now", worker.active),
            "cache_bytes": ("remembered for reuse", worker.remembered_bytes),
            "active_memory_bytes": ("of MLX", mx.get_active_memory()),
            "peak_memory_bytes": ("of MLX", mx.get_peak_memory()),
        }
        text = service.metrics.render(gauges)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The model that is served."""
        self.service.check_ready()
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The same, by its name."""
        name = request.path_params["name"]
        if name != self.service.name:
            raise HttpError(404, f"model {name!r:.100} is not here; {self.service.name} is",
                            "model", "model_not_found")  # fmt: skip
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        service = self.service
        return {
            "id": service.name, "object": "model", "created": service.started,
            "owned_by": "mlx-lfm2vl", "context": service.options.context,
            "detection": detection(service.thousandths),
        }  # fmt: skip

    async def chat(self, request: Request) -> Response:
        """Chat completions."""
        return await self._answer(request, read_chat, ChatWriter, chat_event, b"data: [DONE]\n\n")

    async def chat_tokens(self, request: Request) -> Response:
        """What a chat completion's prompt would cost."""
        return await self._count(request, read_chat)

    async def responses(self, request: Request) -> Response:
        """Responses."""
        return await self._answer(request, read_responses, ResponsesWriter, responses_event, b"")

    async def responses_tokens(self, request: Request) -> Response:
        """What a response's prompt would cost."""
        return await self._count(request, read_responses)

    async def _count(self, request: Request, read: Callable[[Any], Ask]) -> Response:
        self.service.check_ready()
        with self.service.place():
            ask = await read_body(request, read, self.service.options.max_body)
            question = await self.service.question(ask)
        prompt = cast(Prompt, question.prompt)
        images = [image.image_tokens for image in prompt.images]
        length = len(prompt.token_ids)
        return JSONResponse(
            {
                "object": "response.input_tokens",
                "input_tokens": length,
                "image_tokens": images,
                "max_tokens": question.max_tokens,
                "estimated_seconds": self.service.seconds(length, question.max_tokens),
            }
        )

    async def _answer(
        self,
        request: Request,
        read: Callable[[Any], Ask],
        writer: Callable[[Run], Writer],
        event: Callable[[dict[str, Any]], bytes],
        last: bytes,
    ) -> Response:
        service, started = self.service, time.perf_counter()
        service.check_ready()
        with service.place():
            ask = await read_body(request, read, service.options.max_body)
            run = await or_gone(request, service.run(ask, started))
        run.holds_place = False
        headers = {"x-model": service.name.encode("ascii", "replace").decode()}
        if ask.stream:
            writing = stream(run, writer(run), event, last)
            return EventStream(writing, lambda: self._end(request, run), headers)
        try:
            await or_gone(request, run.finish())
            return await asyncio.to_thread(lambda: JSONResponse(writer(run).whole(), 200, headers))
        finally:
            self._end(request, run)

    async def detect(self, request: Request) -> Response:
        """Boxes in a picture."""
        service, started = self.service, time.perf_counter()
        service.check_ready()
        with service.place():
            ask = await read_body(request, read_detect, service.options.max_body)
            run, readings, size = await or_gone(request, service.detect(ask, started))
        run.holds_place = False
        try:
            await or_gone(request, run.finish())
            return await asyncio.to_thread(lambda: JSONResponse(write_detect(run, readings, size)))
        finally:
            self._end(request, run)

    def _end(self, request: Request, run: Run) -> None:
        self.service.end(run)
        usage = run.usage()
        request.scope["log"] |= {
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "completion_tokens": usage["completion_tokens"],
        }


async def or_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Does some work unless the client leaves first; then it is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise HttpError(499, "the client has gone", code="client_closed_request")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def chat_event(body: dict[str, Any]) -> bytes:
    """An event of a stream that has no names."""
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


async def stream(
    run: Run, writer: Writer, event: Callable[[dict[str, Any]], bytes], last: bytes
) -> AsyncGenerator[bytes, None]:
    """The events of a request's answers; what goes wrong is the last of them."""
    try:
        yield b"".join(map(event, writer.begin()))
        async with aclosing(run.news()) as found:
            async for updates in found:
                if not updates:
                    yield f": keepalive {run.progress()}\n\n".encode()
                bodies = [body for update in updates for body in writer.news(update)]
                if bodies:
                    yield b"".join(map(event, bodies))
        # a Responses stream ends with all of its log-probabilities, several times
        yield await asyncio.to_thread(lambda: b"".join(map(event, writer.end())) + last)
    except Exception as error:  # noqa: BLE001 - the client is told
        yield event(as_http(error).to_dict())


class EventStream(StreamingResponse):
    """A stream of events that lets go of its answers, however it ends."""

    media_type = "text/event-stream"

    def __init__(
        self, content: AsyncGenerator[bytes, None], end: Callable[[], None], headers: dict[str, str]
    ) -> None:
        super().__init__(content, headers={**headers, "Cache-Control": "no-store"})
        self.content, self.end = content, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it until it ends or the client leaves."""
        try:
            async with aclosing(self.content):
                await super().__call__(scope, receive, send)
        finally:
            self.end()
