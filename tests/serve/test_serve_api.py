"""The HTTP API with a real engine in this process, without Ray."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from serving import oracle, prefix_file
from tiny_backbones import as_layers
from waiting import wait_until
from worlds import CHAT, COMPLETIONS, MODEL, Play, World, check_error, events

from ptuning.errors import ServeError
from ptuning.types import Message
from serve.http.auth import Keys


def test_a_completion_is_encoded_as_a_training_prompt_and_answered_with_the_users_prefix(
    play: Play,
) -> None:
    async def story(world: World) -> None:
        prefix = prefix_file(world.backbone, "alice")
        world.promote(prefix)
        response = await world.post(user="alice")
        body = response.json()
        template = world.backbone.template
        prompt = template.encode_prompt("hello")
        tokens = oracle(world.backbone, prompt, as_layers(prefix.tensors), 8)
        assert body["choices"][0]["text"] == template.decode(tokens)
        assert body["prefix"] == {"name": "default", "version": "1", "digest": prefix.digest}
        assert response.headers["x-prefix-digest"] == prefix.digest
        assert body["object"] == "text_completion"
        assert body["usage"] == {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(tokens),
            "total_tokens": len(prompt) + len(tokens),
        }

    play(story)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_request_names_which_of_a_users_prefixes_answers(play: Play, path: str) -> None:
    async def story(world: World) -> None:
        prefixes = {
            name: prefix_file(world.backbone, "alice", seed=seed, name=name)
            for seed, name in enumerate(("default", "formal"), start=1)
        }
        for prefix in prefixes.values():
            world.promote(prefix)
        for name, prefix in prefixes.items():
            asked = {} if name == "default" else {"prefix_name": name}
            body = (await world.post(path, user="alice", **asked)).json()
            assert (body["prefix"]["name"], body["prefix"]["digest"]) == (name, prefix.digest)

    play(story)


def test_chat_messages_are_rendered_as_in_training(play: Play) -> None:
    async def story(world: World) -> None:
        turns = [("system", "be brief"), ("user", "hi"), ("assistant", "yes?"), ("user", "go")]
        messages: list[dict[str, Any]] = [{"role": r, "content": c} for r, c in turns]
        messages[-1]["content"] = [{"type": "text", "text": "go"}]
        response = await world.post(CHAT, messages=messages)
        choice = response.json()["choices"][0]
        template = world.backbone.template
        prompt = template.encode_prompt([Message(role=r, content=c) for r, c in turns])
        tokens = oracle(world.backbone, prompt, None, 8)
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"] == template.decode(tokens)
        assert choice["finish_reason"] in ("length", "stop")
        assert response.json()["object"] == "chat.completion"
        assert response.json()["prefix"] is None
        assert response.headers["x-prefix-digest"] == "base"

    play(story)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_says_the_same_in_pieces_and_who_answers_in_its_first_chunk(
    play: Play, path: str
) -> None:
    async def story(world: World) -> None:
        prefix = prefix_file(world.backbone, "alice")
        world.promote(prefix)
        whole = (await world.post(path, user="alice")).json()
        streamed = await world.post(
            path, user="alice", stream=True, stream_options={"include_usage": True}
        )
        assert streamed.headers["x-prefix-digest"] == prefix.digest
        chunks = events(streamed)
        assert chunks[0]["prefix"]["digest"] == prefix.digest
        assert not any("prefix" in chunk for chunk in chunks[1:])
        assert len({chunk["id"] for chunk in chunks}) == 1
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        if path == CHAT:
            text = "".join(choice["delta"].get("content", "") for choice in choices)
            assert text == whole["choices"][0]["message"]["content"]
            assert choices[0]["delta"]["role"] == "assistant"
        else:
            text = "".join(choice["text"] for choice in choices)
            assert text == whole["choices"][0]["text"]
        assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
        assert chunks[-1]["usage"] == whole["usage"]

    play(story)


def test_concurrent_users_get_their_own_answers_and_digests(play: Play) -> None:
    async def story(world: World) -> None:
        users = [f"user{n}" for n in range(6)]
        prefixes = {
            user: prefix_file(world.backbone, user, length=1 + n, seed=n)
            for n, user in enumerate(users)
        }
        for prefix in prefixes.values():
            world.promote(prefix)
        alone = {user: (await world.post(user=user)).json() for user in users}
        together = await asyncio.gather(*(world.post(user=user) for user in users * 3))
        for user, response in zip(users * 3, together, strict=True):
            assert response.json()["prefix"]["digest"] == prefixes[user].digest
            assert response.json()["choices"] == alone[user]["choices"]

    play(story)


BAD: list[tuple[str, dict[str, Any], int, str | None, str | None]] = [
    (COMPLETIONS, {"prompt": ""}, 400, "invalid_value", "prompt"),
    (COMPLETIONS, {"prompt": ["a", "b"]}, 400, "invalid_value", "prompt"),
    (COMPLETIONS, {"prompt": []}, 400, "invalid_value", "prompt"),
    (COMPLETIONS, {"prompt": [1, 2]}, 400, "invalid_value", "prompt"),
    (COMPLETIONS, {"prompt": [[1, 2]]}, 400, "invalid_value", "prompt"),
    (COMPLETIONS, {"prompt": None}, 400, "invalid_value", "prompt"),
    (COMPLETIONS, {"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    (COMPLETIONS, {"max_tokens": "8"}, 400, "invalid_value", "max_tokens"),
    (COMPLETIONS, {"max_tokens": 1.5}, 400, "invalid_value", "max_tokens"),
    (COMPLETIONS, {"max_tokens": 101}, 400, None, "max_tokens"),
    (COMPLETIONS, {"temperature": -1}, 400, "invalid_value", "temperature"),
    (COMPLETIONS, {"temperature": "hot"}, 400, "invalid_value", "temperature"),
    (COMPLETIONS, {"top_p": 0}, 400, "invalid_value", "top_p"),
    (COMPLETIONS, {"n": 2}, 400, "unsupported_value", "n"),
    (COMPLETIONS, {"user": ""}, 400, "invalid_value", "user"),
    (COMPLETIONS, {"user": 7}, 400, "invalid_value", "user"),
    (COMPLETIONS, {"prefix_name": "../up"}, 400, "invalid_value", "prefix_name"),
    (COMPLETIONS, {"stop": [""]}, 400, "invalid_value", "stop.0"),
    (COMPLETIONS, {"best_of": 3}, 400, "unsupported_value", "best_of"),
    (COMPLETIONS, {"beams": 3}, 400, "unsupported_parameter", "beams"),
    (COMPLETIONS, {"model": "gpt-4"}, 404, "model_not_found", "model"),
    (COMPLETIONS, {"prompt": "x" * 65}, 400, "context_length_exceeded", "prompt"),
    (COMPLETIONS, {"prompt": "x" * 500_000}, 400, "context_length_exceeded", "prompt"),
    (CHAT, {"messages": []}, 400, "invalid_value", "messages"),
    (CHAT, {"messages": "hi"}, 400, "invalid_value", "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "missing", "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": ""}]}, 400, "invalid_value", None),
    (CHAT, {"tools": [{}]}, 400, "unsupported_value", "tools"),
    (CHAT, {"frequency_penalty": 0.5}, 400, "unsupported_value", "frequency_penalty"),
]


def test_bad_requests_get_openais_error_and_the_right_status(play: Play) -> None:
    async def story(world: World) -> None:
        for path, body, status, code, param in BAD:
            for stream in (False, True):
                response = await world.post(path, stream=stream, **body)
                check_error(response, status, code, param)

    play(story)


def test_bodies_that_are_no_json_are_400_and_too_large_ones_413(play: Play) -> None:
    async def story(world: World) -> None:
        for body in (b"{", b"", b"\xff\xfe", b"[]", b"null", b'{"model": NaN}'):
            response = await world.client.post(COMPLETIONS, content=body)
            assert response.status_code == 400, body
            assert response.json()["error"]["type"] == "invalid_request_error"
        lone = b'{"model": "tiny", "prompt": "\\ud800"}'
        assert (await world.client.post(COMPLETIONS, content=lone)).status_code == 400
        huge = b'{"prompt": "' + b"x" * 5_000 + b'"}'
        check_error(await world.client.post(COMPLETIONS, content=huge), 413, "body_too_large", None)

    play(story, max_body_bytes=4096)


def test_missing_fields_and_unknown_routes_have_openais_shape(play: Play) -> None:
    async def story(world: World) -> None:
        response = await world.client.post(COMPLETIONS, json={"prompt": "x"})
        check_error(response, 400, "missing", "model")
        check_error(await world.client.get("/v1/nothing"), 404, None, None)
        check_error(await world.client.get(COMPLETIONS), 405, None, None)

    play(story)


def test_the_models_list_holds_the_one_model(play: Play) -> None:
    async def story(world: World) -> None:
        listed = (await world.client.get("/v1/models")).json()
        assert [model["id"] for model in listed["data"]] == [MODEL]
        assert (await world.client.get(f"/v1/models/{MODEL}")).json() == listed["data"][0]
        check_error(await world.client.get("/v1/models/other/one"), 404, "model_not_found", "model")

    play(story)


def test_unknown_users_get_the_base_or_404_by_policy(play: Play) -> None:
    async def base(world: World) -> None:
        for body in ({"user": "stranger"}, {}):
            response = await world.post(**body)
            assert response.json()["prefix"] is None
            assert response.headers["x-prefix-digest"] == "base"

    async def none(world: World) -> None:
        check_error(await world.post(user="stranger"), 404, "user_not_found", "user")
        check_error(await world.post(user="stranger", stream=True), 404, "user_not_found", "user")
        check_error(await world.post(), 400, None, "user")

    play(base)
    play(none, unknown_user="404")


def test_a_store_that_is_down_changes_nothing_for_those_who_are_known(play: Play) -> None:
    async def story(world: World) -> None:
        prefix = prefix_file(world.backbone, "alice")
        world.promote(prefix)
        assert (await world.post(user="alice")).headers["x-prefix-digest"] == prefix.digest

        def down() -> int:
            raise OSError("the store is down")

        world.service.poller.champions.refresh = down  # type: ignore[method-assign]
        world.service.poller.poll()
        assert (await world.post(user="alice")).headers["x-prefix-digest"] == prefix.digest
        assert (await world.post(user="bob")).headers["x-prefix-digest"] == "base"
        lines = await world.lines()
        assert lines['ptuning_champions_errors_total{replica="local"}'] >= 1

    play(story)


def test_a_full_queue_is_a_429_and_a_late_answer_a_504(play: Play) -> None:
    async def full(world: World) -> None:
        answers = await asyncio.gather(*(world.post(max_tokens=60) for _ in range(12)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        refused = answers[statuses.index(429)]
        check_error(refused, 429, "queue_full", None)
        assert refused.headers["retry-after"]

    async def late(world: World) -> None:
        check_error(await world.post(max_tokens=100), 504, "timeout", None)
        while world.service.engine.rows_in_use:  # the test's timeout bounds this
            await asyncio.sleep(0.01)

    play(full, max_rows=1, max_queue=1)
    play(late, request_timeout_s=0.001)


def test_a_cancelled_call_frees_its_row(play: Play) -> None:
    async def story(world: World) -> None:
        task = asyncio.create_task(world.post(max_tokens=100))
        while not world.service.engine.rows_in_use:
            await asyncio.sleep(0.001)
        task.cancel()
        while world.service.engine.rows_in_use:
            await asyncio.sleep(0.001)

    play(story)


def test_the_models_own_positions_bound_prefix_prompt_and_answer(play: Play) -> None:
    async def story(world: World) -> None:
        world.promote(prefix_file(world.backbone, "alice", length=200))
        long = "h" * 255
        fine = await world.post(user="alice", prompt=long, max_tokens=40)
        assert fine.status_code == 200, fine.text
        response = await world.post(user="alice", prompt=long, max_tokens=61)
        check_error(response, 400, "context_length_exceeded", "max_tokens")

    play(story, max_length=300)


def test_keys_decide_who_may_ask_as_whom(play: Play, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"k1": ["alice"], "admin": "*"}))

    async def story(world: World) -> None:
        check_error(await world.post(user="alice"), 401, "invalid_api_key", None)
        check_error(await world.client.get("/v1/models"), 401, "invalid_api_key", None)
        world.client.headers["authorization"] = "Bearer k1"
        assert (await world.post(user="alice")).status_code == 200
        check_error(await world.post(user="bob"), 403, "forbidden", "user")
        world.client.headers["authorization"] = "Bearer admin"
        assert (await world.post(user="bob")).status_code == 200
        assert (await world.client.get("/healthz")).status_code == 200

    play(story, keys=Keys.read(str(path)))


def test_health_and_metrics_speak_of_the_engine_and_never_of_users(play: Play) -> None:
    async def story(world: World) -> None:
        world.promote(prefix_file(world.backbone, "alice"))
        for user in ("alice", "alice", "carol"):
            await world.post(user=user)
        await world.post(max_tokens=0)
        assert (await world.client.get("/healthz")).status_code == 200
        text = (await world.client.get("/metrics")).text
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        assert lines['ptuning_requests_total{endpoint="completions",status="200"}'] == "3"
        assert lines['ptuning_requests_total{endpoint="completions",status="400"}'] == "1"
        local = '{replica="local"}'
        assert lines[f"ptuning_prefix_cache_hits_total{local}"] == "1"
        assert lines[f"ptuning_prefix_cache_misses_total{local}"] == "1"
        assert lines[f"ptuning_champions_errors_total{local}"] == "0"
        assert lines[f"ptuning_rows_in_use{local}"] == "0"
        assert lines[f"ptuning_queue_length{local}"] == "0"
        assert lines[f"ptuning_time_to_first_token_seconds_count{local}"] == "3"
        assert int(lines[f"ptuning_tokens_generated_total{local}"]) > 3
        assert "alice" not in text
        assert "carol" not in text
        world.service.engine.close()
        assert (await world.client.get("/healthz")).status_code == 200
        assert (await world.client.get("/readyz")).status_code == 503

    play(story)


def test_a_dead_engine_answers_503_at_once_and_is_not_ready(play: Play) -> None:
    async def story(world: World) -> None:
        def lost(*_slots: int) -> None:
            raise RuntimeError("CUDA error")

        engine = world.service.engine
        engine.runner.leave = engine.runner.move = lost  # type: ignore[assignment,method-assign]
        longer = [asyncio.create_task(world.post(max_tokens=90)) for _ in range(3)]
        await asyncio.to_thread(wait_until, lambda: engine.rows_in_use == 3)
        assert (await world.post(max_tokens=2)).status_code == 200
        for answer in await asyncio.gather(*longer):
            check_error(answer, 503, "engine_stopped", None)
        for stream in (False, True):
            check_error(await world.post(stream=stream), 503, "not_running", None)
        assert (await world.client.get("/readyz")).status_code == 503
        assert (await world.client.get("/healthz")).status_code == 200
        with pytest.raises(ServeError):
            world.service.report("local")  # Ray Serve's health check, before it replaces a replica

    play(story)


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_error_ends_in_an_event_too(
    play: Play, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(world: World) -> None:
        async def broken(*_name: str) -> None:
            raise KeyError("a secret")

        world.service.prefixes.get = broken  # type: ignore[assignment,method-assign]
        response = await world.post(user="alice", stream=stream)
        check_error(response, 500, None, None)
        assert "secret" not in response.text
        [line] = {r.getMessage() for r in caplog.records if "KeyError" in r.getMessage()}
        assert response.headers["x-ptuning-request-id"] in line

    play(story)
    assert "secret" not in caplog.text
