"""A whole service in this process, without Ray, and helpers to read its answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
from serving import Files

from ptuning.champions import ChampionRef
from ptuning.model.backbone import Backbone
from ptuning.prefix.artifact import Prefix
from ptuning.types import user_key
from serve.config import ServeConfig
from serve.http.api import make_app
from serve.http.auth import Keys
from serve.metrics import Snapshot
from serve.service import Service

MODEL = "tiny"
ADDRESS = "http://127.0.0.1:8000"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Local(Service):
    """A Service as the engine client of its own process."""

    async def reports(self) -> list[Snapshot]:
        return [self.report("local")]


class World:
    """A service with its store and client."""

    def __init__(self, backbone: Backbone, directory: Path, keys: Keys | None, **settings: Any):
        self.backbone = backbone
        self.files = Files(directory)
        defaults = {"max_length": 64, "max_tokens_limit": 100, "refresh_seconds": 0.05}
        self.config = ServeConfig(**{**defaults, **settings})
        self.service = Local(self.config, backbone, self.files.store)
        self.app = app = make_app(self.config, MODEL, self.service, user_key, keys)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url=ADDRESS, timeout=60
        )

    def promote(self, prefix: Prefix, **lies: str) -> ChampionRef:
        """Publish a prefix, and make the service refresh its list."""
        ref = self.files.promote(prefix, **lies)
        self.service.poller.poll()
        return ref

    def openai(self) -> openai.AsyncOpenAI:
        """The official client, unmodified, connected to this service."""
        # The official client uses httpx2.
        transport = httpx2.ASGITransport(app=self.app)
        return openai.AsyncOpenAI(
            base_url=f"{ADDRESS}/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx2.AsyncClient(transport=transport, timeout=60),
        )

    async def lines(self) -> dict[str, float]:
        """The samples of /metrics."""
        text = (await self.client.get("/metrics")).text
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        return {name: float(value) for name, value in samples}

    async def post(self, path: str = COMPLETIONS, **body: Any) -> httpx.Response:
        values = {"model": MODEL, "temperature": 0, "max_tokens": 8, **body}
        if path == COMPLETIONS:
            values.setdefault("prompt", "hello")
        else:
            values.setdefault("messages", [{"role": "user", "content": "hello"}])
        return await self.client.post(path, json=values)


Story = Callable[[World], Coroutine[Any, Any, None]]
Play = Callable[..., None]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream; checks its frame."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def check_error(response: httpx.Response, status: int, code: str | None, param: str | None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"]
