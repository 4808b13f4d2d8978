"""The frames of a stream, field by field, as OpenAI's clients read them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from worlds import CHAT, COMPLETIONS, MODEL, Play, World, events

from serve.events import Delta, Event, Failed, Finished, PrefixInfo, Problem, Started
from serve.http.messages import DONE, Frame

INFO = PrefixInfo(name="default", version="3", digest="d" * 64)


def value_of(chunk: bytes) -> dict[str, Any]:
    assert chunk.startswith(b"data: ")
    assert chunk.endswith(b"\n\n")
    value: dict[str, Any] = json.loads(chunk.removeprefix(b"data: "))
    return value


@pytest.mark.parametrize(
    ("chat", "kind", "id_"),
    [(True, "chat.completion.chunk", "chatcmpl-x"), (False, "text_completion", "cmpl-x")],
)
def test_each_chunk_has_its_whole_form(chat: bool, kind: str, id_: str) -> None:
    frame = Frame(chat=chat, id="x", model=MODEL, created=7)
    head = {"id": id_, "object": kind, "created": 7, "model": MODEL}

    def choice(said: dict[str, Any], text: str, reason: str | None) -> dict[str, Any]:
        what = {"delta": said} if chat else {"text": text}
        return {"index": 0, **what, "finish_reason": reason, "logprobs": None}

    prefix = {"name": "default", "version": "3", "digest": "d" * 64}
    opening = choice({"role": "assistant", "content": ""}, "", None)
    assert value_of(frame.first_chunk(INFO)) == {**head, "choices": [opening], "prefix": prefix}
    assert value_of(frame.first_chunk(None)) == {**head, "choices": [opening], "prefix": None}
    said = choice({"content": "é"}, "é", None)
    assert value_of(frame.chunk("é")) == {**head, "choices": [said]}
    for reason in ("stop", "length"):
        assert value_of(frame.chunk(None, reason)) == {**head, "choices": [choice({}, "", reason)]}
    counts = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert value_of(frame.usage_chunk(3, 4)) == {**head, "choices": [], "usage": counts}
    assert DONE == b"data: [DONE]\n\n"


def test_a_chat_stream_opens_with_the_role_and_closes_with_an_empty_delta_and_the_counts(
    play: Play,
) -> None:
    async def story(world: World) -> None:
        asked = {"max_tokens": 5, "stream": True, "seed": 1, "temperature": 1}
        chunks = events(await world.post(CHAT, stream_options={"include_usage": True}, **asked))
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        first, *middle, last, counts = chunks
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
        assert all(chunk["choices"][0]["finish_reason"] is None for chunk in (first, *middle))
        assert last["choices"][0]["delta"] == {}
        assert last["choices"][0]["finish_reason"] in ("stop", "length")
        assert counts["choices"] == []
        assert counts["usage"]["completion_tokens"] == 5 or middle == []
        assert not any("usage" in chunk for chunk in (first, *middle, last))
        without = events(await world.post(CHAT, **asked))
        assert not any("usage" in chunk for chunk in without)
        assert [c["choices"] for c in without] == [c["choices"] for c in chunks[:-1]]

    play(story)


def test_the_official_clients_stream_adds_up_to_its_whole_answer(play: Play) -> None:
    async def story(world: World) -> None:
        client = world.openai()
        asked: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "hi"}],
            "temperature": 0,
            "max_tokens": 8,
        }
        cut = (await client.chat.completions.create(**asked)).choices[0].message.content
        assert cut
        asked["stop"] = cut[3:5]  # the client's helper refuses an answer that was cut at its limit
        whole = await client.chat.completions.create(**asked)
        assert whole.choices[0].finish_reason == "stop"
        async with client.chat.completions.stream(
            **asked, stream_options={"include_usage": True}
        ) as stream:
            final = await stream.get_final_completion()
        message = final.choices[0].message
        assert (message.role, message.content) == ("assistant", whole.choices[0].message.content)
        assert final.choices[0].finish_reason == whole.choices[0].finish_reason
        assert final.usage == whole.usage

    play(story)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("how", ["event", "exception", "silence"])
def test_a_stream_that_breaks_off_says_so_in_its_last_event(
    play: Play, path: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    problem = Problem(status=503, message="the engine has stopped", code="engine_stopped")

    async def story(world: World) -> None:
        async def broken(_ask: object) -> Any:
            event: Event
            for event in (Started(prefix=INFO, prompt_tokens=3), Delta(text="half a secret")):
                yield event
            if how == "event":
                yield Failed(problem=problem)
            elif how == "exception":
                raise RuntimeError("half a secret")

        world.service.stream = broken  # type: ignore[assignment,method-assign]
        chunks = events(await world.post(path, stream=True))
        error = chunks[-1]["error"]
        if how == "event":
            assert error == problem.body()["error"]
        else:
            assert error["type"] == "server_error"
        assert not any(c["choices"][0]["finish_reason"] for c in chunks[:-1])
        assert (await world.lines())["ptuning_stream_errors_total"] == 1

    play(story)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert any(INFO.digest in line and "request " in line for line in lines)
    assert not any("secret" in line for line in lines)


def test_an_answer_without_a_first_event_is_a_500(play: Play) -> None:
    async def story(world: World) -> None:
        async def silent(_ask: object) -> Any:
            nothing: tuple[Event, ...] = ()
            for event in nothing:
                yield event

        async def headless(_ask: object) -> Any:
            yield Finished(reason="stop", completion_tokens=1)

        for stream in (silent, headless):
            world.service.stream = stream  # type: ignore[assignment,method-assign]
            assert (await world.post(stream=True)).status_code == 500
            assert (await world.post()).status_code == 500

    play(story)
