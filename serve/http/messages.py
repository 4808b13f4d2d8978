"""HTTP bodies in OpenAI's formats: requests as strict models, answers and chunks as JSON values.

The models here have the fields that this service implements. Fields that it accepts only with a
neutral value are in the tables of `fields.py`: silently ignoring `n=2` or `tools` would give a
wrong answer that looks right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ptuning.registry.base import PREFIX_NAME_PATTERN
from ptuning.types import Message
from serve.config import ServeConfig
from serve.events import Answer, Ask, PrefixInfo, Refused, too_long
from serve.http.fields import CHAT, COMPLETION, MESSAGE, PART, STREAM_OPTIONS, Table, drop_neutral

Text = Annotated[str, Field(min_length=1)]


def _list_of(value: object) -> object:
    """Accept a single text for a list of texts; a union type would give confusing errors."""
    return [value] if isinstance(value, str) else value


def _list_of_parts(value: object) -> object:
    if value is None:
        raise ValueError("a message needs content; tool calls and refusals are not supported")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _only_prompt(value: object) -> object:
    """Accept a list of one prompt, which old clients send."""
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise ValueError(f"one prompt per request, not {len(value)}")
    if not isinstance(value[0], str):
        raise ValueError("the prompt must be text, not token ids")
    return value[0]


Stops = Annotated[list[Text], Field(max_length=16), BeforeValidator(_list_of)] | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None


class _Body(_Strict):
    """The fields of both endpoints."""

    NEUTRAL: ClassVar[Table]

    model: Text
    user: Text | None = None
    prefix_name: Annotated[str, Field(pattern=f"^{PREFIX_NAME_PATTERN}$")] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def limit(self) -> int | None:
        return self.max_tokens

    def text(self) -> str | tuple[Message, ...]:
        raise NotImplementedError

    def ask(self, config: ServeConfig, request_id: str, user_key: Callable[[str], str]) -> Ask:
        """The request with the service's defaults. Raises Refused (400)."""
        limit = self.limit()
        if limit is not None and limit > config.max_tokens_limit:
            raise Refused(
                f"max_tokens is {limit}; this service allows at most {config.max_tokens_limit}",
                status=400,
                param="max_tokens",
            )
        temperature = self.temperature
        return Ask(
            id=request_id,
            user_key=None if self.user is None else user_key(self.user),
            prefix_name=self.prefix_name or "default",
            prompt=self.text(),
            max_tokens=limit or min(config.max_tokens_default, config.max_tokens_limit),
            temperature=config.temperature_default if temperature is None else temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(self.stop or ()),
        )


class CompletionBody(_Body):
    """POST /v1/completions: `prompt` is encoded like a training row's prompt."""

    NEUTRAL: ClassVar[Table] = COMPLETION

    prompt: Annotated[Text, BeforeValidator(_only_prompt)]

    def text(self) -> str:
        return self.prompt


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Turn(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart], Field(min_length=1), BeforeValidator(_list_of_parts)]
    name: str | None = None

    def message(self) -> Message:
        return Message(role=self.role, content="".join(part.text for part in self.content))


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    NEUTRAL: ClassVar[Table] = CHAT

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check_text(self) -> ChatBody:
        if not any(turn.message().content for turn in self.messages):
            raise ValueError("every message is empty")
        return self

    def limit(self) -> int | None:
        # The newer name wins, as in OpenAI's service.
        return self.max_completion_tokens or self.max_tokens

    def text(self) -> tuple[Message, ...]:
        return tuple(turn.message() for turn in self.messages)


Body = TypeVar("Body", CompletionBody, ChatBody)


def parse(body_type: type[Body], data: bytes, config: ServeConfig) -> Body:
    """Parse and validate a body. Raises Refused (400), which names the first problem.

    Messages and their parts are counted before any work that takes time per message.
    """
    try:
        value = pydantic_core.from_json(data.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as error:
        raise Refused("the body is not valid JSON", status=400, code="invalid_json") from error
    if not isinstance(value, dict):
        raise Refused("the body is not a JSON object", status=400, code="invalid_value")
    _check_count(value, config)
    try:
        return body_type.model_validate(_drop_neutral(body_type, value))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    code = "missing" if first["type"] == "missing" else "invalid_value"
    message = first["msg"].removeprefix("Value error, ")
    text = f"{where}: {message}" if where else message
    raise Refused(text, status=400, code=code, param=where or None)


def _check_count(body: Mapping[str, Any], config: ServeConfig) -> None:
    """Raise Refused (400) for too many messages, or too many parts in total."""
    messages, most = body.get("messages"), config.max_messages
    if not isinstance(messages, list):
        return
    contents = [item.get("content") for item in messages[: most + 1] if isinstance(item, dict)]
    parts = sum(len(content) for content in contents if isinstance(content, list))
    for count, what in ((len(messages), "messages"), (parts, "parts of content")):
        if count > most:
            raise Refused(
                f"this service takes at most {most} {what} per request; this one has {count}",
                status=400,
                code="too_many_messages",
                param="messages",
            )
    if len(messages) > config.max_length:  # each needs at least one token of the template
        raise too_long(f"at least {len(messages)}", config.max_length, "messages")


def _drop_neutral(body_type: type[_Body], body: Mapping[str, Any]) -> dict[str, Any]:
    """The body without neutral fields, at every depth. Raises Refused (400)."""
    kept = drop_neutral(body, body_type.NEUTRAL, body_type.model_fields.keys())
    if isinstance(options := kept.get("stream_options"), dict):
        names = StreamOptions.model_fields.keys()
        kept["stream_options"] = drop_neutral(options, STREAM_OPTIONS, names, "stream_options.")
    if isinstance(messages := kept.get("messages"), list):
        kept["messages"] = [_message(turn, f"messages.{n}.") for n, turn in enumerate(messages)]
    return kept


def _message(turn: Any, where: str) -> Any:
    """A message without neutral fields; a value that is not an object is returned unchanged."""
    if not isinstance(turn, dict):
        return turn
    kept = drop_neutral(turn, MESSAGE, Turn.model_fields.keys(), where)
    if isinstance(parts := kept.get("content"), list):
        names = TextPart.model_fields.keys()
        kept["content"] = [
            drop_neutral(part, PART, names, f"{where}content.{n}.") if _is_text(part) else part
            for n, part in enumerate(parts)
        ]
    return kept


def _is_text(part: object) -> bool:
    """Whether a part is text. Other parts are refused for their type rather than their fields."""
    return isinstance(part, dict) and part.get("type") == "text"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; virtual tokens are not counted, since the caller did not send them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def prefix_value(info: PrefixInfo | None) -> dict[str, str] | None:
    if info is None:
        return None
    return {"name": info.name, "version": info.version, "digest": info.digest}


def digest_header(info: PrefixInfo | None) -> dict[str, str]:
    return {"x-prefix-digest": info.digest if info else "base"}


class Frame:
    """The fixed parts of a response: its id, type, model and time (epoch seconds)."""

    def __init__(self, *, chat: bool, id: str, model: str, created: int) -> None:
        self.chat = chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{id}"
        self._model, self._created = model, created

    def _envelope(self, object_type: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": object_type,
            "created": self._created,
            "model": self._model,
            "choices": list(choices),
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        content: dict[str, Any] = {"text": answer.text}
        if self.chat:
            content = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        choice = {"index": 0, **content, "finish_reason": answer.reason, "logprobs": None}
        object_type = "chat.completion" if self.chat else "text_completion"
        return {
            **self._envelope(object_type, [choice]),
            "usage": usage(answer.prompt_tokens, answer.completion_tokens),
            "prefix": prefix_value(answer.prefix),
        }

    def chunk(self, text: str | None, reason: str | None = None) -> bytes:
        """One server-sent event with a piece of text (None: no text)."""
        if self.chat:
            delta = {} if text is None else {"content": text}
            content: dict[str, Any] = {"delta": delta}
        else:
            content = {"text": text or ""}
        choice = {"index": 0, **content, "finish_reason": reason, "logprobs": None}
        return sse(self._envelope(self._chunk_type, [choice]))

    def first_chunk(self, info: PrefixInfo | None) -> bytes:
        """The first chunk: no text, but the prefix that answers."""
        content: dict[str, Any] = {"text": ""}
        if self.chat:
            content = {"delta": {"role": "assistant", "content": ""}}
        choice = {"index": 0, **content, "finish_reason": None, "logprobs": None}
        return sse({**self._envelope(self._chunk_type, [choice]), "prefix": prefix_value(info)})

    def usage_chunk(self, prompt_tokens: int, completion_tokens: int) -> bytes:
        """The last chunk, sent if the client requests `include_usage`."""
        counts = usage(prompt_tokens, completion_tokens)
        return sse({**self._envelope(self._chunk_type, []), "usage": counts})

    @property
    def _chunk_type(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


DONE = b"data: [DONE]\n\n"
