"""The two Ray Serve deployments: `Engine` has a backbone, `Http` is the ingress.

They are thin wrappers of `service.py` and `api.py`, which do not depend on Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from typing import Any

import ray.serve.context
import torch
from fastapi import FastAPI

from ptuning.data.encode import TemplateKind
from ptuning.model.facts import BackboneConfig
from ptuning.model.load import load_backbone
from ptuning.store import Store
from ptuning.store_identity import StoreIdentity
from serve import local_ray, logs
from serve.config import ServeConfig
from serve.events import Answer, Ask, Event, Failed, Problem
from serve.http.api import make_app
from serve.http.auth import Keys
from serve.metrics import Snapshot
from serve.service import Service

_REPORT_SECONDS = 5.0  # a replica that does not answer within this time counts as down


class EngineReplica:
    """Loads the backbone in its constructor, so that a running replica is ready."""

    def __init__(
        self,
        config: ServeConfig,
        backbone: BackboneConfig,
        template: TemplateKind,
        store: str,
    ) -> None:
        local_ray.keep_replica_on_loopback()
        logs.append_to(config.log_file)
        torch.set_num_threads(config.num_threads or _fair_threads(config.replicas))
        loaded = load_backbone(
            backbone,
            # For inference SDPA is faster on a CPU too.
            attention="sdpa" if backbone.attention == "auto" else backbone.attention,
            template=template,
        )
        self._service = Service(config, loaded, Store(store))
        context = ray.serve.context._get_internal_replica_context()
        self._name = context.replica_tag if context else "0"

    async def answer(self, ask: Ask) -> Answer | Failed:
        return await self._service.answer(ask)

    async def stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        events = self._service.stream(ask)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def report(self) -> Snapshot:
        return self._service.report(self._name)

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica whose engine has died."""
        self._service.report(self._name)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # after a failed constructor there is no service
            self._service.close()


class HttpReplica:
    """Ray Serve's ingress: builds the HTTP application with a handle to the engines."""

    def __init__(
        self, config: ServeConfig, model: str, engine: Any, identity: StoreIdentity
    ) -> None:
        local_ray.keep_replica_on_loopback()
        logs.append_to(config.log_file)
        self._config, self._model, self._engine = config, model, engine
        self._identity = identity

    def __serve_build_asgi_app__(self) -> FastAPI:  # called by Ray Serve
        path = self._config.api_keys_file
        keys = Keys.read(path) if path is not None else None
        client = RayEngineClient(self._engine)
        return make_app(self._config, self._model, client, self._identity.user_key, keys)


class RayEngineClient:
    """An `EngineClient` that uses a deployment handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def answer(self, ask: Ask) -> Answer | Failed:
        response = self._handle.answer.remote(ask)
        try:
            result: Answer | Failed = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - Ray raises many unrelated types
            return _ray_failure(error)
        return result

    async def stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        events = self._streaming.stream.remote(ask)
        done = False
        try:
            async for event in events:
                yield event
            done = True
        except Exception as error:  # noqa: BLE001 - as above
            done = True
            yield _ray_failure(error)
        finally:
            if not done:
                events.cancel()

    async def reports(self) -> list[Snapshot]:
        answers = await self._handle.broadcast("report").results_async(
            timeout_s=_REPORT_SECONDS, return_exceptions=True
        )
        return [answer for answer in answers if isinstance(answer, Snapshot)]


def _ray_failure(error: Exception) -> Failed:
    """Convert an error of Ray Serve to an event: a full queue, or a dead or missing replica."""
    if isinstance(error, ray.serve.exceptions.BackPressureError):
        problem = Problem(status=429, message="too many requests are waiting", code="queue_full")
    else:
        name = type(error).__name__
        message = f"the engine replica could not answer ({name})"
        problem = Problem(status=503, message=message, code="replica_unavailable")
    return Failed(problem=problem)


def _fair_threads(replicas: int) -> int:
    return max(1, (os.cpu_count() or 1) // replicas)
