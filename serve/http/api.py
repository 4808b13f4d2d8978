"""The HTTP side: OpenAI's endpoints as a FastAPI application, without Ray.

It parses, checks, asks an engine (behind `EngineClient`) and writes answers; it knows no
model. Every error, also of routing, has OpenAI's shape.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from serve.config import ServeConfig
from serve.events import Answer, Ask, Delta, Event, Failed, Finished, Problem, Refused, Started
from serve.http.auth import Keys
from serve.http.messages import (
    DONE,
    ChatBody,
    CompletionBody,
    Frame,
    StreamOptions,
    digest_header,
    parse,
    sse,
)
from serve.metrics import Metrics, Snapshot, render

log = logging.getLogger("ptuning.serve")


class EngineClient(Protocol):
    """How the HTTP side reaches the engines; Ray's handle or, in tests, a Service."""

    async def answer(self, ask: Ask) -> Answer | Failed:
        """One whole answer. Cancelling the call frees the row."""

    def stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """One request's events. Closing the generator frees the row."""

    async def reports(self) -> list[Snapshot]:
        """Every live replica's metrics; fewer than `config.replicas` where some are down."""


class Api:
    """The endpoints' bodies."""

    def __init__(
        self, config: ServeConfig, model: str, engine: EngineClient, keys: Keys | None
    ) -> None:
        self.config, self.model, self.engine, self.keys = config, model, engine, keys
        self.metrics = Metrics()
        self.started = int(time.time())

    async def chat(self, request: Request) -> Response:
        body = parse(ChatBody, await self._read(request))
        return await self._respond(request, body, chat=True)

    async def completions(self, request: Request) -> Response:
        body = parse(CompletionBody, await self._read(request))
        return await self._respond(request, body, chat=False)

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._model_value()]})

    async def one_model(self, request: Request) -> Response:
        self._check_key(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_value())

    async def health(self, _request: Request) -> Response:
        """200 once every replica has its model loaded and its engine running."""
        ready = len(await self._reports())
        healthy = ready == self.config.replicas
        value = {"status": "ok" if healthy else "unavailable", "replicas_ready": ready}
        return JSONResponse(value, status_code=200 if healthy else 503)

    async def prometheus(self, _request: Request) -> Response:
        reports = await self._reports()
        own = self.metrics.snapshot({"ptuning_replicas": len(reports)}, ["ptuning_requests_total"])
        own.values.pop(("ptuning_requests_total", ()), None)  # only with its labels
        text = render([own, *reports])
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _reports(self) -> list[Snapshot]:
        try:
            return await self.engine.reports()
        except Exception as error:  # noqa: BLE001 - an engine that cannot be asked is not ready
            log.warning("the engine replicas cannot be asked: %s", error)
            return []

    async def _read(self, request: Request) -> bytes:
        limit = self.config.max_body_bytes
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > limit:
                raise Refused(
                    f"the body has more than {limit} bytes", status=413, code="body_too_large"
                )
        return bytes(data)

    async def _respond(
        self, request: Request, body: ChatBody | CompletionBody, *, chat: bool
    ) -> Response:
        if self.keys is not None:
            self.keys.check(request.headers.get("authorization"), body.user)
        self._check_model(body.model)
        ask = body.ask(self.config)
        frame = Frame(chat=chat, id=uuid.uuid4().hex, model=self.model, created=int(time.time()))
        if body.stream:
            return await self._stream(frame, ask, body.stream_options or StreamOptions())
        answer = await self.engine.answer(ask)
        if isinstance(answer, Failed):
            return problem_response(answer.problem)
        return JSONResponse(frame.whole(answer), headers=digest_header(answer.prefix))

    async def _stream(self, frame: Frame, ask: Ask, options: StreamOptions) -> Response:
        """The status and headers wait for the first event, so that early errors have theirs."""
        events = self.engine.stream(ask)
        try:
            first = await anext(events)
        except BaseException:
            await events.aclose()
            raise
        if not isinstance(first, Started):
            await events.aclose()
            failed = first if isinstance(first, Failed) else _broken()
            return problem_response(failed.problem)
        return StreamingResponse(
            _chunks(frame, first, events, options),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", **digest_header(first.prefix)},
        )

    def _check_key(self, request: Request) -> None:
        if self.keys is not None:
            self.keys.check_caller(request.headers.get("authorization"))

    def _check_model(self, name: str) -> None:
        if name != self.model:
            raise Refused(
                f"no model {name!r} here; GET /v1/models lists what there is",
                status=404,
                code="model_not_found",
                param="model",
            )

    def _model_value(self) -> dict[str, object]:
        return {
            "id": self.model,
            "object": "model",
            "created": self.started,
            "owned_by": "ptuning",
        }


async def _chunks(
    frame: Frame,
    started: Started,
    events: AsyncGenerator[Event, None],
    options: StreamOptions,
) -> AsyncGenerator[bytes, None]:
    """Server-sent events of a stream that has begun."""
    try:
        yield frame.first(started.prefix)
        async for event in events:
            if isinstance(event, Delta):
                yield frame.chunk(event.text)
            elif isinstance(event, Finished):
                yield frame.chunk(None, event.reason)
                if options.include_usage:
                    yield frame.counted(started.prompt_tokens, event.completion_tokens)
            elif isinstance(event, Failed):
                yield sse(event.problem.body())
        yield DONE
    finally:
        await events.aclose()


def _broken() -> Failed:
    return Failed(problem=Problem(status=500, message="the answer did not begin", code=None))


def problem_response(problem: Problem) -> Response:
    headers = {"retry-after": "1"} if problem.status in (429, 503) else {}
    return JSONResponse(problem.body(), status_code=problem.status, headers=headers)


def make_app(
    config: ServeConfig, model: str, engine: EngineClient, keys: Keys | None = None
) -> FastAPI:
    """The application for one served model name."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    api = Api(config, model, engine, keys)
    app.add_api_route("/v1/chat/completions", _counted(api, api.chat), methods=["POST"])
    app.add_api_route("/v1/completions", _counted(api, api.completions), methods=["POST"])
    app.add_api_route("/v1/models", _counted(api, api.models), methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", _counted(api, api.one_model), methods=["GET"])
    app.add_api_route("/healthz", api.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", api.prometheus, methods=["GET"], response_model=None)

    async def unrouted(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return problem_response(Problem(status=error.status_code, message=str(error.detail)))

    app.add_exception_handler(HTTPException, unrouted)
    return app


Endpoint = Callable[[Request], Awaitable[Response]]


def _counted(api: Api, endpoint: Endpoint) -> Endpoint:
    """Turn errors into answers and count every answer by endpoint and status."""
    name = endpoint.__name__

    async def call(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except Refused as error:
            response = problem_response(error.problem)
        except Exception:
            log.exception("a request failed")
            response = problem_response(Problem(status=500, message="internal error", code=None))
        api.metrics.add("ptuning_requests_total", endpoint=name, status=str(response.status_code))
        return response

    return call
