"""OpenAI's client in its usual loop, and all fields that its documentation lists."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any

import httpx
import openai
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import ChatCompletionMessage
from openai.types.chat import completion_create_params as chat_params
from serving import prefix_file
from worlds import CHAT, COMPLETIONS, MODEL, Play, World, check_error

from ptuning.data.encode import Template
from ptuning.model.backbone import Backbone
from ptuning.types import Message
from serve.config import ServeConfig
from serve.engine.encoders import Encoders
from serve.events import Refused
from serve.http.fields import CHAT as CHAT_FIELDS
from serve.http.fields import COMPLETION as COMPLETION_FIELDS
from serve.http.fields import MESSAGE, Anything, Table
from serve.http.messages import ChatBody, CompletionBody, Turn, parse

USER: Any = {"role": "user", "content": "hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

# For each field, a value that asks for a different answer.
DEMANDING: dict[str, Any] = {
    "n": 2,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "logit_bias": {"50": -100},
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "logprobs": True,
    "top_logprobs": 5,
    "modalities": ["text", "audio"],
    "moderation": {"model": "omni-moderation-latest"},
    "parallel_tool_calls": "sometimes",
    "reasoning_effort": "high",
    "response_format": {"type": "json_object"},
    "service_tier": "flex",
    "store": True,
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "verbosity": "low",
    "web_search_options": {},
    "echo": True,
    "best_of": 3,
    "suffix": "!",
    "use_beam_search": True,
    "early_stopping": True,
    "length_penalty": 2,
    "repetition_penalty": 1.1,
    "top_k": 40,
    "min_p": 0.1,
    "typical_p": 0.9,
    "min_tokens": 5,
    "ignore_eos": True,
    "stop_token_ids": [1],
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "add_special_tokens": False,
    "bad_words": ["x"],
    "logits_processors": ["x"],
    "add_generation_prompt": False,
    "continue_final_message": True,
    "chat_template_kwargs": {"enable_thinking": True},
    "documents": [{"text": "x"}],
    "include_reasoning": True,
    "thinking": {"type": "enabled"},
}
# Fields that well-known clients send with neutral values.
NEUTRAL: dict[str, Any] = {
    "response_format": {"type": "text"},
    "tool_choice": "none",
    "store": False,
    "functions": None,
    "function_call": None,
    "tools": None,
    "reasoning_effort": None,
    "service_tier": "auto",
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "prediction": {"type": "content", "content": "x"},
    "metadata": {"a": "b"},
    "n": 1,
    "frequency_penalty": 0.0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "best_of": None,
    "top_k": -1,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
    "prefix_name": None,
    "nobody_knows_this": None,
}


def chat(**fields: Any) -> ChatBody:
    body = {"model": MODEL, "messages": [USER], **fields}
    return parse(ChatBody, json.dumps(body).encode(), ServeConfig())


def completion(**fields: Any) -> CompletionBody:
    body = {"model": MODEL, "prompt": "hi", **fields}
    return parse(CompletionBody, json.dumps(body).encode(), ServeConfig())


def documented(kind: Any, streaming: Any) -> set[str]:
    return {*kind.__annotations__, *streaming.__annotations__}


def test_every_parameter_that_openai_documents_is_implemented_or_has_its_neutral_values() -> None:
    chats = documented(
        chat_params.CompletionCreateParamsBase, chat_params.CompletionCreateParamsStreaming
    )
    assert "reasoning_effort" in chats
    assert chats - ChatBody.model_fields.keys() - CHAT_FIELDS.keys() == set()
    completions = documented(
        completion_params.CompletionCreateParamsBase,
        completion_params.CompletionCreateParamsStreaming,
    )
    known = CompletionBody.model_fields.keys() | COMPLETION_FIELDS.keys()
    assert completions - known == set()
    messages = ChatCompletionMessage.model_fields.keys()
    assert messages - Turn.model_fields.keys() - MESSAGE.keys() == set()


@pytest.mark.parametrize(
    ("kind", "table"), [(chat, CHAT_FIELDS), (completion, COMPLETION_FIELDS)], ids=["chat", "text"]
)
def test_null_and_neutral_values_change_nothing_and_others_are_refused_by_name(
    kind: Any, table: Table
) -> None:
    plain = kind()
    for name, neutral in table.items():
        assert kind(**{name: None}) == plain
        if isinstance(neutral, Anything):
            assert kind(**{name: {"any": ["thing"]}}) == plain
            continue
        for value in neutral:
            assert kind(**{name: value}) == plain
        for value in (DEMANDING[name], "something else", 17):
            with pytest.raises(Refused) as caught:
                kind(**{name: value})
            problem = caught.value.problem
            assert (problem.status, problem.param) == (400, name)
            assert problem.code == "unsupported_value"
            assert problem.message.startswith(f"{name}: only ")


def test_the_implemented_fields_take_null_where_they_have_a_default() -> None:
    for kind in (chat, completion):
        body = kind()
        for name in type(body).model_fields.keys() - {"model", "messages", "prompt"}:
            assert kind(**{name: None}) == body


@pytest.mark.parametrize("field", ["n", "top_logprobs"])
def test_true_is_no_number(field: str) -> None:
    with pytest.raises(Refused):
        chat(**{field: field == "n"})


def test_names_that_nobody_knows_are_refused() -> None:
    with pytest.raises(Refused, match="temprature") as caught:
        chat(temprature=0)
    assert caught.value.problem.code == "unsupported_parameter"


def test_the_official_clients_loop_goes_on_with_the_services_own_answers(play: Play) -> None:
    async def story(world: World) -> None:
        world.promote(prefix_file(world.backbone, "alice"))
        client = world.openai()

        async def ask(messages: list[Any]) -> ChatCompletionMessage:
            answer = await client.chat.completions.create(
                model=MODEL, user="alice", messages=messages, max_tokens=4, temperature=0
            )
            return answer.choices[0].message

        messages: list[Any] = [USER]
        message = await ask(messages)
        assert message.content is not None
        plain = [USER, {"role": "assistant", "content": message.content}, USER]
        wanted = await ask(plain)
        # As an object, and in each way of serialising it.
        for turn in (message, message.model_dump(), message.to_dict(), message.dict()):
            assert await ask([USER, turn, USER]) == wanted

    play(story, max_length=400)


def test_neutral_fields_reach_the_answer_as_if_they_were_not_there(play: Play) -> None:
    async def story(world: World) -> None:
        client = world.openai()
        asked: dict[str, Any] = {"model": MODEL, "messages": [USER], "temperature": 0}
        plain = await client.chat.completions.create(**asked, max_tokens=4)
        same = await client.chat.completions.create(**asked, max_tokens=4, extra_body=NEUTRAL)
        assert same.choices == plain.choices

    play(story)


def test_a_history_with_reasoning_and_caching_marks_is_taken_and_a_tool_call_named(
    play: Play,
) -> None:
    async def story(world: World) -> None:
        client = world.openai()

        async def ask(*messages: Any) -> str | None:
            answer = await client.chat.completions.create(
                model=MODEL, messages=messages, max_tokens=4, temperature=0
            )
            return answer.choices[0].message.content

        turn = {"role": "assistant", "content": "yes"}
        wanted = await ask(USER, turn, USER)
        marks: dict[str, Any] = {
            "reasoning_content": None,
            "reasoning": "",
            "annotations": [],
            "tool_calls": [],
        }
        assert await ask(USER, {**turn, **marks}, USER) == wanted
        part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
        assert await ask({"role": "user", "content": [part]}, turn, USER) == wanted
        assert await ask(USER, {**turn, "content": ""}, USER) is not None

        called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        result = {"role": "tool", "tool_call_id": "c", "content": "12"}
        with pytest.raises(openai.BadRequestError, match="does not call tools") as caught:
            await ask(USER, called, result, USER)
        assert caught.value.param == "messages.1.tool_calls"
        with pytest.raises(openai.BadRequestError, match="a message needs content"):
            await ask(USER, {"role": "assistant", "content": None}, USER)
        image = {"type": "image_url", "image_url": {"url": "data:"}}
        with pytest.raises(openai.BadRequestError) as caught:
            await ask({"role": "user", "content": [image]})
        assert caught.value.param == "messages.0.content.0.type"

    play(story, max_length=400)


def test_a_developers_turn_is_the_systems_where_the_template_knows_no_developer(
    play: Play,
) -> None:
    async def prompt_tokens(world: World, role: str) -> int:
        messages = [{"role": role, "content": "be brief"}, USER]
        response = await world.post(CHAT, messages=messages)
        assert response.status_code == 200, response.text
        return int(response.json()["usage"]["prompt_tokens"])

    async def story(world: World) -> None:
        template = world.backbone.template
        turns = [Message(role="system", content="be brief"), Message(role="user", content="hi")]
        assert await prompt_tokens(world, "developer") == len(template.encode_prompt(turns))
        assert await prompt_tokens(world, "system") == len(template.encode_prompt(turns))

    play(story)


def test_a_template_that_knows_developers_gets_them(backbone: Backbone) -> None:
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.chat_template = "{# developer #}" + str(tokenizer.chat_template)
    template = Template.of(tokenizer, "chat")
    turns = (Message(role="developer", content="be brief"), Message(role="user", content="hi"))
    encoders = Encoders(template, 1)
    try:
        assert asyncio.run(encoders.encode(turns)) == template.encode_prompt(turns)
    finally:
        encoders.close()


def test_a_prompt_may_stand_in_a_list_of_one(play: Play) -> None:
    async def story(world: World) -> None:
        client = world.openai()
        asked: dict[str, Any] = {"model": MODEL, "max_tokens": 4, "temperature": 0}
        plain = await client.completions.create(**asked, prompt="hi")
        listed = await client.completions.create(**asked, prompt=["hi"])
        assert listed.choices == plain.choices
        for prompt, words in ((["a", "b"], "one prompt"), ([1, 2], "one prompt"), ([[1]], "text")):
            with pytest.raises(openai.BadRequestError, match=words):
                await client.completions.create(**asked, prompt=prompt)

    play(story)


def test_a_compressed_body_is_a_415_and_a_byte_order_mark_is_skipped(play: Play) -> None:
    async def story(world: World) -> None:
        body = json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": 1}).encode()
        for encoding, status in (("gzip", 415), ("identity", 200)):
            headers = {"content-encoding": encoding}
            response = await world.client.post(COMPLETIONS, content=body, headers=headers)
            assert response.status_code == status
        check_error(
            await world.client.post(
                COMPLETIONS, content=b"\x1f\x8b", headers={"content-encoding": "gzip"}
            ),
            415,
            "unsupported_encoding",
            None,
        )
        marked = await world.client.post(COMPLETIONS, content=b"\xef\xbb\xbf" + body)
        assert marked.status_code == 200

    play(story)


def test_every_answer_names_its_request(play: Play) -> None:
    async def story(world: World) -> None:
        raw = await world.openai().chat.completions.with_raw_response.create(
            model=MODEL, messages=[USER], max_tokens=1
        )
        assert raw.parse().id == f"chatcmpl-{raw.headers['x-ptuning-request-id']}"
        refused = await world.post(CHAT, n=2)
        assert refused.headers["x-ptuning-request-id"]
        ids = await asyncio.gather(*(world.post() for _ in range(3)))
        assert len({response.headers["x-ptuning-request-id"] for response in ids}) == 3

    play(story)


def test_a_callers_token_that_the_model_has_no_row_for_is_that_request_alone(play: Play) -> None:
    async def story(world: World) -> None:
        # The tokenizer has a token for which the model has no embedding.
        template = copy.deepcopy(world.backbone.template)
        template.tokenizer.add_tokens(["<new>"])
        assert template.ids("<new>") == [world.backbone.facts.vocab_size]
        alone = await world.post(prompt="hello")
        world.service._encoders = Encoders(template, 2)
        for stream in (False, True):
            prompts = ["hello", "good day", "a <new> one", "bye", "again", "last"]
            answers: list[httpx.Response] = await asyncio.gather(
                *(world.post(prompt=prompt, stream=stream) for prompt in prompts)
            )
            assert [a.status_code for a in answers] == [200, 200, 400, 200, 200, 200]
            check_error(answers[2], 400, "unknown_token", "prompt")
        again = await world.post(prompt="hello")
        assert again.json()["choices"] == alone.json()["choices"]
        chat = await world.post(CHAT, messages=[{"role": "user", "content": "<new>"}])
        check_error(chat, 400, "unknown_token", "messages")

    play(story)
