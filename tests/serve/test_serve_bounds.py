"""No user waits for another's large, slow or unauthenticated request."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from serving import byte_tokenizer
from worlds import CHAT, COMPLETIONS, MODEL, Play, World, check_error

from ptuning.data.encode import Template
from ptuning.types import Message
from serve.engine.encoders import Encoders
from serve.http.auth import Keys

MANY = 80_000
PROMPT_SECONDS = 5.0


def many_messages(count: int) -> bytes:
    messages = [{"role": "user", "content": "a"}] * count
    return json.dumps({"model": MODEL, "max_tokens": 1, "messages": messages}).encode()


@pytest.mark.parametrize(
    ("most", "code"), [(512, "too_many_messages"), (100_000, "context_length_exceeded")]
)
def test_eighty_thousand_messages_are_refused_before_they_cost_anybody_time(
    play: Play, most: int, code: str
) -> None:
    async def story(world: World) -> None:
        body = many_messages(MANY)
        assert 2_400_000 < len(body) < world.config.max_body_bytes
        await world.post()
        began = time.monotonic()
        large = asyncio.create_task(world.client.post(CHAT, content=body))
        await asyncio.sleep(0)
        short = await world.post()
        assert short.status_code == 200
        waited = time.monotonic() - began
        check_error(await large, 400, code, "messages")
        assert waited < PROMPT_SECONDS, "one request delayed another"
        assert time.monotonic() - began < 2 * PROMPT_SECONDS

    play(story, max_messages=most)


def test_messages_and_parts_are_counted_apart_from_their_characters(play: Play) -> None:
    async def story(world: World) -> None:
        turn = {"role": "user", "content": "a"}
        assert (await world.post(CHAT, messages=[turn] * 4)).status_code == 200
        check_error(
            await world.post(CHAT, messages=[turn] * 5), 400, "too_many_messages", "messages"
        )
        parts = [{"type": "text", "text": "a"}]
        for messages in ([{**turn, "content": parts * 5}], [{**turn, "content": parts * 3}] * 2):
            response = await world.post(CHAT, messages=messages)
            check_error(response, 400, "too_many_messages", "messages")

    play(story, max_messages=4)


class SlowTemplate(Template):
    """Keeps a thread busy with the prompt `slow` until the test ends it."""

    may_go = threading.Event()

    def encode_prompt(self, prompt: str | Sequence[Message], max_length: int = 512) -> list[int]:
        if prompt == "slow":
            assert self.may_go.wait(30)
        return super().encode_prompt(prompt, max_length)


def test_a_prompt_that_is_slow_to_encode_keeps_no_other_waiting(play: Play) -> None:
    async def story(world: World) -> None:
        SlowTemplate.may_go.clear()
        world.service._encoders.close()
        world.service._encoders = Encoders(SlowTemplate.of(world.backbone.tokenizer), 2)
        slow = asyncio.create_task(world.post(prompt="slow"))
        try:
            for _ in range(3):
                response = await asyncio.wait_for(world.post(), PROMPT_SECONDS)
                assert response.status_code == 200
            assert not slow.done()
        finally:
            SlowTemplate.may_go.set()
        assert (await slow).status_code == 200

    play(story)


def test_encoders_share_no_tokenizer_and_encode_as_the_template_does() -> None:
    template = Template.of(byte_tokenizer(), "chat")
    encoders = Encoders(template, 3)
    texts = [f"text {n} " * (n % 7) + "é" for n in range(200)]

    async def encode_all() -> list[list[int]]:
        return await asyncio.gather(*(encoders.encode(text) for text in texts))

    try:
        copies = [encoders._free.get_nowait() for _ in range(3)]
        backends = {id(copy.tokenizer.backend_tokenizer) for copy in (template, *copies)}
        assert len({id(copy.tokenizer) for copy in (template, *copies)}) == 4
        assert len(backends) == 4
        assert {copy.digest for copy in copies} == {template.digest}
        for copy in copies:
            encoders._free.put(copy)
        assert asyncio.run(encode_all()) == [template.encode_prompt(t, 1 << 20) for t in texts]
    finally:
        encoders.close()


class Body:
    """A body that arrives in pieces and records whether it was read."""

    def __init__(self, *pieces: bytes, pause_s: float = 0.0) -> None:
        self.pieces, self.pause_s, self.read = pieces, pause_s, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            self.read = True
            yield piece
            await asyncio.sleep(self.pause_s)


KEYS = {"k1": ["alice"]}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_without_a_key_nothing_of_the_body_is_read(play: Play, tmp_path: Any, path: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(KEYS))

    async def story(world: World) -> None:
        for headers in ({}, {"authorization": "Bearer k2"}, {"content-encoding": "gzip"}):
            body = Body(b"{", b"not JSON")
            response = await world.client.post(path, content=body, headers=headers)
            check_error(response, 401, "invalid_api_key", None)
            assert not body.read
        known = {"authorization": "Bearer k1"}
        response = await world.client.post(path, content=Body(b"{"), headers=known)
        check_error(response, 400, "invalid_json", None)

    play(story, keys=Keys.read(str(file)))


def test_a_body_that_does_not_come_is_a_408(play: Play) -> None:
    async def story(world: World) -> None:
        whole = json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": 1}).encode()
        slow = Body(*(whole[at : at + 1] for at in range(len(whole))), pause_s=0.1)
        began = time.monotonic()
        response = await world.client.post(COMPLETIONS, content=slow)
        check_error(response, 408, "body_timeout", None)
        assert time.monotonic() - began < PROMPT_SECONDS
        in_time = Body(whole[:9], whole[9:], pause_s=0.05)
        assert (await world.client.post(COMPLETIONS, content=in_time)).status_code == 200

    play(story, body_timeout_s=0.5)


def test_a_body_that_announces_too_much_is_refused_unread(play: Play) -> None:
    async def story(world: World) -> None:
        body = Body(b"x" * 10)
        headers = {"content-length": "5000"}
        response = await world.client.post(COMPLETIONS, content=body, headers=headers)
        check_error(response, 413, "body_too_large", None)
        assert not body.read

    play(story, max_body_bytes=4096)
