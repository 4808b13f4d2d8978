"""Fixtures for the service's tests; their building blocks are in `serving.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Listener, MakeRequest, save_llama
from worlds import Play, Story, World

from ptuning.model.backbone import Backbone
from ptuning.model.load import load_backbone
from serve.engine.engine import HeldPrefix, Request
from serve.http.auth import Keys


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: tiny models gain nothing from more, which cost much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def backbone(model_dir: Path) -> Backbone:
    return load_backbone(str(model_dir), dtype="float32", attention="sdpa", device="cpu")


@pytest.fixture
def make_request(backbone: Backbone) -> MakeRequest:
    """Make a request with a text as prompt, and its listener."""
    count = iter(range(10**6))

    def make(
        text: str, prefix: HeldPrefix | None = None, **settings: object
    ) -> tuple[Request, Listener]:
        heard = Listener.new()
        values = {"max_tokens": 12, **settings}
        request = Request(
            id=f"r{next(count)}",
            prompt=tuple(backbone.template.ids(text)),
            prefix=prefix,
            emit=heard.events.put,
            **values,  # type: ignore[arg-type]
        )
        return request, heard

    return make


@pytest.fixture
def play(backbone: Backbone, tmp_path: Path) -> Play:
    """Run a story (a coroutine) against a new service with these settings."""

    @asynccontextmanager
    async def opened(keys: Keys | None, settings: dict[str, Any]) -> AsyncIterator[World]:
        world = World(backbone, tmp_path, keys, **settings)
        try:
            async with world.client:
                yield world
        finally:
            world.service.close()

    def tell(story: Story, keys: Keys | None = None, **settings: Any) -> None:
        async def main() -> None:
            async with opened(keys, settings) as world:
                await asyncio.wait_for(story(world), 60)

        asyncio.run(main())

    return tell
