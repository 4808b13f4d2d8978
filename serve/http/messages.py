"""HTTP bodies in OpenAI's shapes: requests as strict models, answers and chunks as JSON values.

A parameter that this service does not implement is an error unless it has its neutral
value: ignoring `n=2` or `tools` silently would give a wrong answer that looks right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ptuning.registry.base import PREFIX_NAME_PATTERN
from ptuning.types import Message, user_key
from serve.config import ServeConfig
from serve.events import Answer, Ask, PrefixInfo, Refused

Text = Annotated[str, Field(min_length=1)]
Neutral = Annotated[float, Field(ge=0, le=0)] | None
NothingIn = Annotated[dict[str, Any], Field(max_length=0)] | None


def _several(value: object) -> object:
    """One text where a list of texts may stand; a union would muddle the error messages."""
    return [value] if isinstance(value, str) else value


def _parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Stops = Annotated[list[Text], Field(max_length=16), BeforeValidator(_several)] | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class _Body(_Strict):
    """What both endpoints take."""

    model: Text
    user: Text | None = None
    prefix_name: Annotated[str, Field(pattern=f"^{PREFIX_NAME_PATTERN}$")] = "default"
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted with their neutral values only.
    n: Literal[1] | None = None
    frequency_penalty: Neutral = None
    presence_penalty: Neutral = None
    logit_bias: NothingIn = None
    metadata: dict[str, str] | None = None

    def limit(self) -> int | None:
        return self.max_tokens

    def text(self) -> str | tuple[Message, ...]:
        raise NotImplementedError

    def ask(self, config: ServeConfig) -> Ask:
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
            user_key=None if self.user is None else user_key(self.user),
            prefix_name=self.prefix_name,
            prompt=self.text(),
            max_tokens=limit or min(config.max_tokens_default, config.max_tokens_limit),
            temperature=config.temperature_default if temperature is None else temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(self.stop or ()),
        )


class CompletionBody(_Body):
    """POST /v1/completions: `prompt` is encoded as a training row's prompt."""

    prompt: Text
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None
    suffix: None = None

    def text(self) -> str:
        return self.prompt


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Turn(_Strict):
    role: Text
    content: Annotated[list[TextPart], Field(min_length=1), BeforeValidator(_parts)]
    name: str | None = None

    def message(self) -> Message:
        return Message(role=self.role, content="".join(part.text for part in self.content))


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatBody:
        if not any(turn.message().content for turn in self.messages):
            raise ValueError("every message is empty")
        return self

    def limit(self) -> int | None:
        # The newer name wins, as in OpenAI's service.
        return self.max_completion_tokens or self.max_tokens

    def text(self) -> tuple[Message, ...]:
        return tuple(turn.message() for turn in self.messages)


Body = TypeVar("Body", CompletionBody, ChatBody)


def parse(kind: type[Body], data: bytes) -> Body:
    """A checked body, or Refused (400) that names the first thing wrong."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    code = {"json_invalid": "invalid_json", "extra_forbidden": "unsupported_parameter"}.get(
        first["type"], "missing" if first["type"] == "missing" else "invalid_value"
    )
    message = "the body is not valid JSON" if code == "invalid_json" else first["msg"]
    text = f"{where}: {message}" if where else message
    raise Refused(text, status=400, code=code, param=where or None)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; virtual tokens are not the caller's and not counted."""
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
    """The fixed parts of one response: its id, kind, model and time (epoch seconds)."""

    def __init__(self, *, chat: bool, id: str, model: str, created: int) -> None:
        self.chat = chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{id}"
        self._model, self._created = model, created

    def _envelope(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": list(choices),
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        said: dict[str, Any] = {"text": answer.text}
        if self.chat:
            said = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        choice = {"index": 0, **said, "finish_reason": answer.reason, "logprobs": None}
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            **self._envelope(kind, [choice]),
            "usage": usage(answer.prompt_tokens, answer.completion_tokens),
            "prefix": prefix_value(answer.prefix),
        }

    def chunk(self, text: str | None, reason: str | None = None) -> bytes:
        """One server-sent event with a piece of text (None: nothing is said)."""
        if self.chat:
            delta = {} if text is None else {"content": text}
            said: dict[str, Any] = {"delta": delta}
        else:
            said = {"text": text or ""}
        choice = {"index": 0, **said, "finish_reason": reason, "logprobs": None}
        return sse(self._envelope(self._kind, [choice]))

    def first(self, info: PrefixInfo | None) -> bytes:
        """The first chunk: no text, but who answers."""
        said: dict[str, Any] = {"text": ""}
        if self.chat:
            said = {"delta": {"role": "assistant", "content": ""}}
        choice = {"index": 0, **said, "finish_reason": None, "logprobs": None}
        return sse({**self._envelope(self._kind, [choice]), "prefix": prefix_value(info)})

    def counted(self, prompt_tokens: int, completion_tokens: int) -> bytes:
        """The last chunk where the client asked for `include_usage`."""
        counts = usage(prompt_tokens, completion_tokens)
        return sse({**self._envelope(self._kind, []), "usage": counts})

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


DONE = b"data: [DONE]\n\n"
