"""Types shared by all parts of the library.

Shape letters used in comments and names everywhere:

    U users (slots of a pack)   R rows of a batch   T tokens   P virtual tokens
    L layers   H key-value heads   D head dimension   E hidden size   V vocabulary
    N supervised positions of a batch
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, TypedDict

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticUndefined

from ptuning.errors import ConfigError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
Status = Literal["trained", "unchanged", "too_few", "retired", "failed"]
Decision = Literal["promoted", "rejected", "pending"]


class Config(BaseModel):
    """Base of every component's configuration: frozen, and unknown keys are errors.

    An invalid value raises ConfigError, with the setting's name in a run's configuration
    (`train.epochs`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    SECTION: ClassVar[str] = ""  # of a run's configuration; "": the top level
    ERROR: ClassVar[type[ConfigError]] = ConfigError

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, settings: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(settings)
        except ValidationError as error:
            raise _explain_setting(error, cls) from error


def _explain_setting(error: ValidationError, config: type[Config]) -> ConfigError:
    """Convert pydantic's error about a setting to ours, which says what to change."""
    first, *more = error.errors()
    section = config.SECTION or "the configuration"
    if not first["loc"]:
        return config.ERROR(
            f"the settings of {section} must be a mapping",
            seen=repr(first["input"])[:200],
            expected="settings by name",
            fix=f"pass {config.__name__}(setting=value), or a mapping",
        )
    key = str(first["loc"][0])
    name = f"{config.SECTION}.{key}" if config.SECTION else key
    if key not in config.model_fields:
        return config.ERROR(
            f"{section} has no such setting",
            seen=name,
            expected=", ".join(sorted(config.model_fields)),
            fix="use one of these, or omit it",
        )
    # For a setting of several types, pydantic reports an error for each type.
    same = [line for line in (first, *more) if line["loc"][0] == first["loc"][0]]
    wanted = dict.fromkeys(line["msg"].removeprefix("Input should be ") for line in same)
    default = config.model_fields[key].default
    return config.ERROR(
        f"a setting cannot be used: {name}",
        seen=f"{name}={first['input']!r}"[:200],
        expected=" or ".join(wanted),
        fix=f"change {name}"
        + ("" if default is PydanticUndefined else f", or omit it to use {default!r}"),
    )


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of one user: a prompt (or messages) and the completion to learn.

    It has either `prompt` and `completion`, or `messages`, the last from the assistant.
    `timestamp` is in epoch milliseconds.

        Example(prompt="2+2?", completion="4")
    """

    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Message, ...] | None = None
    timestamp: int | None = None
    split: Split | None = None
    init_words: str | None = None


class EpochLoss(TypedDict):
    """One line of a training history; losses in nats per completion token."""

    epoch: int
    train: float | None
    valid: float | None


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Why a candidate was promoted or not. Gains are in nats per completion token."""

    decision: Decision
    reason: str
    gain_over_base: float | None = None
    gain_over_champion: float | None = None
    confidence: float | None = None  # share of bootstrap resamples above min_gain
    weak: bool = False  # too few validation tokens for the bootstrap


@dataclass(frozen=True, kw_only=True)
class SplitLosses:
    """One prefix's summed nats and token counts for each row of one split of one user."""

    nats: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()

    @property
    def nll(self) -> float | None:
        """Nats per completion token over all tokens, or None without tokens."""
        total = sum(self.tokens)
        return sum(self.nats) / total if total else None


class Counts(TypedDict):
    """How much data one user has in one split; `tokens` are predicted tokens."""

    rows: int
    tokens: int


@dataclass(kw_only=True)
class UserReport:
    """A run's report on one user. `losses[name][split]` has the names base, champion, candidate
    and other (see `ScoredUser`); `counts[split]` is the data used in training and scoring.
    `measured` has the metrics that the worker measured, by name."""

    user_key: str
    status: Status
    digest: str | None = None
    decision: Decision | None = None
    error: str | None = None
    stage: str | None = None
    steps: int = 0
    tokens: int = 0
    history: list[EpochLoss] = field(default_factory=list)
    losses: dict[str, dict[str, SplitLosses]] = field(default_factory=dict)
    counts: dict[Split, Counts] = field(default_factory=dict)
    gate: Gate | None = None
    measured: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def user_key(user_id: str, salt: bytes = b"") -> str:
    """The user's pseudonym outside inputs and partitions: 52 characters of [a-z2-7].

    It is the lower-case, unpadded base32 of HMAC-SHA256(salt, the id's UTF-8 bytes) (RFC 2104),
    safe as a file name, in MLflow and in an engine's cache keys. The id is not normalised: ids
    that differ in one byte are different users. Without the salt nobody can test whether a key
    belongs to an e-mail address they guess. A store has a salt (`ptuning.store_identity`); the
    library by itself uses the empty salt.

        >>> user_key("alice") == user_key("alice", b"") != user_key("alice", b"a store's salt")
        True
    """
    digest = hmac.digest(salt, user_id.encode("utf-8"), "sha256")
    return base64.b32encode(digest).decode("ascii").rstrip("=").lower()


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends only on `parts`, never on process, order or time."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 1
