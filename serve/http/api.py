"""The HTTP side: OpenAI's endpoints as a FastAPI application, without Ray.

It parses and validates requests, passes them to an engine (behind `EngineClient`) and writes the
responses; it has no model. Every error, including routing errors, has OpenAI's format.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from serve.config import ServeConfig
from serve.events import Answer, Ask, Delta, Event, Failed, Finished, Problem, Refused, Started
from serve.http.answers import problem_response
from serve.http.auth import Keys, check_user
from serve.http.guard import LocalOnly
from serve.http.messages import (
    DONE,
    Body,
    ChatBody,
    CompletionBody,
    Frame,
    StreamOptions,
    digest_header,
    parse,
    sse,
)
from serve.logs import LOGGER, describe
from serve.metrics import HTTP_FAMILIES, Metrics, Snapshot, render

log = logging.getLogger(LOGGER)

# Not x-request-id, which Ray Serve sets to the caller's value: our ids must be unique.
REQUEST_ID = "x-ptuning-request-id"


class EngineClient(Protocol):
    """The HTTP side's access to the engines: Ray's handle or, in tests, a Service."""

    async def answer(self, ask: Ask) -> Answer | Failed:
        """A complete answer. Cancelling the call frees the row."""

    def stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """A request's events. Closing the generator frees the row."""

    async def reports(self) -> list[Snapshot]:
        """The metrics of all live replicas; fewer than `config.replicas` if some are down."""


class Api:
    """The endpoints."""

    def __init__(
        self,
        config: ServeConfig,
        model: str,
        engine: EngineClient,
        user_key: Callable[[str], str],
        keys: Keys | None,
    ) -> None:
        self.config, self.model, self.engine, self.keys = config, model, engine, keys
        self.user_key = user_key
        self.metrics = Metrics()
        self.started = int(time.time())

    async def chat(self, request: Request) -> Response:
        return await self._respond(request, ChatBody)

    async def completions(self, request: Request) -> Response:
        return await self._respond(request, CompletionBody)

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._model_value()]})

    async def one_model(self, request: Request) -> Response:
        self._check_key(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_value())

    async def health(self, _request: Request) -> Response:
        """200: this process is alive."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        """200 if an engine can answer: its model is loaded and its thread is running."""
        ready, wanted = len(await self._reports()), self.config.replicas
        status = "unavailable" if not ready else "ok" if ready >= wanted else "degraded"
        value = {"status": status, "replicas_ready": ready, "replicas": wanted}
        return JSONResponse(value, status_code=200 if ready else 503)

    async def prometheus(self, _request: Request) -> Response:
        reports = await self._reports()
        local = self.metrics.snapshot({"ptuning_replicas": len(reports)}, HTTP_FAMILIES)
        text = render([local, *reports])
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _reports(self) -> list[Snapshot]:
        try:
            return await self.engine.reports()
        except Exception as error:  # noqa: BLE001 - an engine that cannot be reached is not ready
            log.warning("the engine replicas cannot be reached: %s", describe(error))
            return []

    async def _read(self, request: Request) -> bytes:
        """The body. Raises Refused: 415 if compressed, 413 if too large, 408 if late."""
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise Refused(
                "the body is compressed; this service reads plain JSON",
                status=415,
                code="unsupported_encoding",
            )
        try:
            async with asyncio.timeout(self.config.body_timeout_s):
                return await self._read_all(request)
        except TimeoutError as error:
            raise Refused(
                f"the body did not arrive within {self.config.body_timeout_s:g} s",
                status=408,
                code="body_timeout",
            ) from error

    async def _read_all(self, request: Request) -> bytes:
        limit = self.config.max_body_bytes
        announced = request.headers.get("content-length", "")
        data = bytearray()
        if not (announced.isdecimal() and int(announced) > limit):
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    break
            else:
                return bytes(data)
        raise Refused(f"the body has more than {limit} bytes", status=413, code="body_too_large")

    async def _respond(self, request: Request, body_type: type[Body]) -> Response:
        """Answer a request; the caller is authenticated before the body is read."""
        users = self._check_key(request)
        body = parse(body_type, await self._read(request), self.config)
        check_user(users, body.user)
        self._check_model(body.model)
        ask = body.ask(self.config, request.state.id, self.user_key)
        chat = body_type is ChatBody
        frame = Frame(chat=chat, id=ask.id, model=self.model, created=int(time.time()))
        if body.stream:
            return await self._stream(frame, ask, body.stream_options or StreamOptions())
        answer = await self.engine.answer(ask)
        if isinstance(answer, Failed):
            return self._failed(ask, answer)
        return JSONResponse(frame.whole(answer), headers=digest_header(answer.prefix))

    def _failed(self, ask: Ask, failed: Failed) -> Response:
        _log_failure(ask, failed.problem)
        return problem_response(failed.problem)

    async def _stream(self, frame: Frame, ask: Ask, options: StreamOptions) -> Response:
        """Stream an answer. Status and headers wait for the first event, so that an early error can
        set them."""
        events = self.engine.stream(ask)
        try:
            first = await anext(events, None)
        except BaseException:
            await events.aclose()
            raise
        if not isinstance(first, Started):
            await events.aclose()
            return self._failed(ask, first if isinstance(first, Failed) else _BROKEN)
        return StreamingResponse(
            self._chunks(frame, ask, first, events, options),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", **digest_header(first.prefix)},
        )

    async def _chunks(
        self,
        frame: Frame,
        ask: Ask,
        started: Started,
        events: AsyncGenerator[Event, None],
        options: StreamOptions,
    ) -> AsyncGenerator[bytes, None]:
        """The server-sent events of a stream that has started; the last one says how it ended."""
        last: Event = _BROKEN
        try:
            yield frame.first_chunk(started.prefix)
            try:
                async for event in events:
                    if isinstance(event, Delta):
                        yield frame.chunk(event.text)
                    else:
                        last = event
            except Exception as error:  # noqa: BLE001 - the status is sent: report it in the stream
                log.error("request %s: the stream failed: %s", ask.id, describe(error))
            if isinstance(last, Finished):
                yield frame.chunk(None, last.reason)
                if options.include_usage:
                    yield frame.usage_chunk(started.prompt_tokens, last.completion_tokens)
            else:
                failed = last if isinstance(last, Failed) else _BROKEN
                self.metrics.add("ptuning_stream_errors_total")
                _log_failure(ask, failed.problem, started)
                yield sse(failed.problem.body())
            yield DONE
        finally:
            await events.aclose()

    def _check_key(self, request: Request) -> frozenset[str] | None:
        """The users that the caller may name; None: any. Raises Refused (401)."""
        if self.keys is None:
            return None
        return self.keys.check_caller(request.headers.get("authorization"))

    def _check_model(self, name: str) -> None:
        if name != self.model:
            raise Refused(
                f"no model {name[:200]!r} here; GET /v1/models lists the models",
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


_BROKEN = Failed(problem=Problem(status=500, message="the answer is incomplete", code=None))


def _log_failure(ask: Ask, problem: Problem, started: Started | None = None) -> None:
    """Log a line for each error that /metrics counts, without the user or the prompt."""
    if problem.status >= 500:
        digest = digest_header(started.prefix)["x-prefix-digest"] if started else "not known"
        log.error(
            "request %s: failed with %d (%s), prefix %s",
            ask.id,
            problem.status,
            problem.code,
            digest,
        )


def make_app(
    config: ServeConfig,
    model: str,
    engine: EngineClient,
    user_key: Callable[[str], str],
    keys: Keys | None = None,
) -> FastAPI:
    """The application for one model name; `user_key` converts ids to the store's keys."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    api = Api(config, model, engine, user_key, keys)
    app.add_api_route("/v1/chat/completions", _count(api, api.chat), methods=["POST"])
    app.add_api_route("/v1/completions", _count(api, api.completions), methods=["POST"])
    app.add_api_route("/v1/models", _count(api, api.models), methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", _count(api, api.one_model), methods=["GET"])
    app.add_api_route("/healthz", api.health, methods=["GET"], response_model=None)
    app.add_api_route("/readyz", api.ready, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", api.prometheus, methods=["GET"], response_model=None)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-prefix-digest", REQUEST_ID],
        )
    if keys is None:
        app.add_middleware(LocalOnly, config=config)  # added last, so it runs first

    async def unrouted(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return problem_response(Problem(status=error.status_code, message=str(error.detail)))

    app.add_exception_handler(HTTPException, unrouted)
    return app


Endpoint = Callable[[Request], Awaitable[Response]]


def _count(api: Api, endpoint: Endpoint) -> Endpoint:
    """Give each request an id, convert errors to responses, and count responses by status."""
    name = endpoint.__name__

    async def call(request: Request) -> Response:
        request.state.id = uuid.uuid4().hex
        try:
            response = await endpoint(request)
        except Refused as error:
            response = problem_response(error.problem)
        except ClientDisconnect:
            problem = Problem(status=499, message="the client left", code="cancelled")
            response = problem_response(problem)
        except Exception as error:
            log.error("request %s: %s failed: %s", request.state.id, name, describe(error))
            log.debug("how it failed", exc_info=True)
            response = problem_response(Problem(status=500, message="internal error", code=None))
        response.headers[REQUEST_ID] = request.state.id
        api.metrics.add("ptuning_requests_total", endpoint=name, status=str(response.status_code))
        return response

    return call
