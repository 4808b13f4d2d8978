"""The messages between the HTTP side and an engine: a request and its events.

Expected failures are events (`Failed`), not exceptions, because Ray wraps exceptions and their
class is lost.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ptuning.errors import ServeError
from ptuning.types import Message

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An error in the form that OpenAI's clients expect, with its HTTP status."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        if self.status == 401:
            return "authentication_error"
        if self.status == 403:
            return "permission_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class Refused(ServeError):
    """Raised to answer a request with a `Problem`."""

    def __init__(
        self, message: str, *, status: int, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message, status=status, code=code, param=param)

    @property
    def problem(self) -> Problem:
        return Problem(message=self.message, **self.fields)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_refused, (asdict(self.problem),))


def _rebuild_refused(fields: dict[str, Any]) -> Refused:
    return Refused(fields.pop("message"), **fields)


def too_long(tokens: str, most: int, param: str) -> Refused:
    """The refusal of a prompt with too many tokens; `tokens` may be "at least 1200" if they were
    not counted."""
    return Refused(
        f"this service takes prompts of at most {most} tokens; this one has {tokens}",
        status=400,
        code="context_length_exceeded",
        param=param,
    )


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A validated request. `user_key` is None if the request names no user; `id` identifies the
    request in logs and in the answer."""

    id: str
    user_key: str | None
    prefix_name: str
    prompt: str | tuple[Message, ...]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PrefixInfo:
    """The prefix that answers, as in the response's `prefix`."""

    name: str
    version: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Started:
    """The first event: the request is in the batch. `prefix` is None if the base model answers."""

    prefix: PrefixInfo | None
    prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A piece of the answer's text: only complete characters, and never part of a stop string."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last event of an answer. `completion_tokens` counts the end token too."""

    reason: FinishReason
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The last event of a request that has no answer, or an incomplete one."""

    problem: Problem


Event = Started | Delta | Finished | Failed


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A complete answer, assembled from a request's events."""

    prefix: PrefixInfo | None
    text: str
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
