"""Rows of users: what is accepted, in which order, which split, which are kept.

Pure and without torch. Everything that depends on order uses one total order (time, then a
hash of the row's content), never the order in which rows were read: the same rows give the
same splits, the same selection and the same digest whatever files they came in.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import groupby
from typing import Literal

from pydantic import Field

from ptuning.data.encode import Template, TemplateKind
from ptuning.errors import DataError
from ptuning.types import SPLITS, Config, Example, Message, Split, user_key

COLUMNS = ("user_id", "prompt", "completion", "messages", "timestamp", "split", "init_words")
ROLES = ("system", "user", "assistant", "tool")

_SLACK = 16  # tokens that text and template may take more together than apart
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)
_EARLIEST = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MS
_LATEST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MS
# Tables with gaps hold whole numbers as floats, so CSV files made from them end in ".0".
_DIGITS = re.compile(r"([+-]?[0-9]{1,18})(\.0*)?", re.ASCII)
# Only the extended form: fromisoformat would also read the digits 20240131 as a date.
_ISO = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ].*)?", re.ASCII)


# Fields of DataConfig that say what a run does with users who left: no part of a partition.
NOT_OF_ROWS = ("on_shrink", "max_shrink")


class DataConfig(Config):
    """Which rows are learned from, and how they are laid out on disk."""

    template: TemplateKind = Field(
        default="auto",
        description="how a row is written for the model; auto: chat if it has a template",
    )
    max_length: int = Field(
        default=512,
        ge=8,
        description="tokens of a row, virtual tokens not counted; longer prompts are cut",
    )
    max_rows: int | None = Field(
        default=None,
        ge=2,
        description="keep each user's newest rows: 4/5 of this from train, 1/5 from valid",
    )
    max_users: int | None = Field(
        default=None, ge=1, description="keep the users with the most rows (ties by id)"
    )
    min_examples: int = Field(
        default=8, ge=1, description="users with fewer train + valid rows are not trained (too_few)"
    )
    max_bad_fraction: float = Field(
        default=0.05, ge=0.0, le=1.0, description="a larger share of quarantined rows fails the run"
    )
    on_shrink: Literal["base", "keep"] = Field(
        default="base",
        description="who answers a user whose rows are gone, or too few now: the base model, or "
        "the prefix of the rows that were there",
    )
    max_shrink: float = Field(
        default=0.2,
        ge=0.0,
        le=1.0,
        description="a run that would take the prefix of a larger share of its users stops first",
    )
    buckets: int | None = Field(
        default=None,
        ge=1,
        le=99_999,
        description="partitions of users on disk; unset: one per 32 MiB of input text, at least 8",
    )


_user_key = lru_cache(maxsize=1 << 16)(user_key)  # a user has many rows; base32 is slow


@dataclass(frozen=True, slots=True)
class Row:
    """One checked input row."""

    user_id: str
    user_key: str
    example: Example


def check_row(raw: Mapping[str, object]) -> Row:
    """A raw row's values, checked. Raises DataError whose `message` is a short reason.

    None and NaN mean that a column is absent; columns that are not in COLUMNS are ignored.
    `user_id` is any non-empty string, kept byte for byte (blanks at its ends too, and an id
    of blanks alone is an id). `timestamp` is a datetime, ISO 8601 text (without a zone:
    UTC) or epoch milliseconds (a whole number, or its digits as text).
    """
    values = {name: raw.get(name) for name in COLUMNS}
    absent = {name for name, value in values.items() if value is None or value != value}
    user_id = _text(values, "user_id", absent)
    if not user_id:
        raise DataError("user_id is missing" if user_id is None else "user_id is empty")
    prompt = _text(values, "prompt", absent)
    completion = _text(values, "completion", absent)
    messages = None if "messages" in absent else _messages(values["messages"])
    _check_shape(prompt, completion, messages)
    split = _text(values, "split", absent)
    if split is not None and split not in SPLITS:
        raise DataError(f"split is not one of {', '.join(SPLITS)}")
    example = Example(
        prompt=prompt,
        completion=completion,
        messages=messages,
        timestamp=None if "timestamp" in absent else _timestamp(values["timestamp"]),
        split=split,
        init_words=_text(values, "init_words", absent),
    )
    return Row(user_id, _user_key(user_id), example)


def check_example(example: Example) -> None:
    """A library user's row: Example's types, and the rules of `check_row`. Raises DataError."""
    if not isinstance(example, Example):
        raise DataError(
            f"the row is not an Example but {_kind(example)}",
            seen=repr(example)[:80],
            expected="ptuning.Example(prompt=..., completion=...)",
            fix="make Examples of the rows",
        )
    for name in ("prompt", "completion", "init_words"):
        if (text := getattr(example, name)) is not None:
            _string(text, name)
    if (turns := example.messages) is not None:
        alike = isinstance(turns, (list, tuple)) and all(isinstance(one, Message) for one in turns)
        _messages([vars(turn) for turn in turns] if alike else turns)
        if not alike:
            raise DataError("messages are not ptuning.Message(role=..., content=...)", seen=turns)
    _check_shape(example.prompt, example.completion, example.messages)
    if example.split is not None and example.split not in SPLITS:
        raise DataError(f"split is not one of {', '.join(SPLITS)}", seen=repr(example.split))
    if (stamp := example.timestamp) is not None:
        if type(stamp) is not int:
            raise DataError(
                f"timestamp is not an int but {_kind(stamp)}",
                seen=repr(stamp),
                expected="epoch milliseconds",
                fix="make an int of it",
            )
        _timestamp(stamp)


def _text(values: Mapping[str, object], name: str, absent: set[str]) -> str | None:
    return None if name in absent else _string(values[name], name)


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is not a string but {_kind(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{name} is not valid UTF-8") from None
    return value


def _kind(value: object) -> str:
    names = {"NoneType": "missing", "dict": "an object", "list": "a list"}
    return names.get(type(value).__name__, type(value).__name__)


def _check_shape(
    prompt: str | None, completion: str | None, messages: tuple[Message, ...] | None
) -> None:
    if messages is not None:
        if prompt is not None or completion is not None:
            raise DataError("the row has both messages and a prompt or completion")
        return
    if prompt is None or completion is None:
        missing = "completion" if prompt is not None else "prompt"
        if prompt is None and completion is None:
            missing = "prompt, completion or messages"
        raise DataError(f"{missing} is missing")
    if not completion:
        raise DataError("completion is empty")


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, (list, tuple)):
        raise DataError(f"messages is not a list but {_kind(value)}")
    if not value:
        raise DataError("messages is empty")
    turns = []
    for item in value:
        if not isinstance(item, Mapping):
            raise DataError(f"a message is not an object but {_kind(item)}")
        role = _string(item.get("role"), "a message's role")
        if role not in ROLES:
            raise DataError(f"a message's role is not one of {', '.join(ROLES)}")
        turns.append(
            Message(role=role, content=_string(item.get("content"), "a message's content"))
        )
    if turns[-1].role != "assistant":
        raise DataError("the last message is not from the assistant")
    if not turns[-1].content:
        raise DataError("completion is empty")
    return tuple(turns)


def _timestamp(value: object) -> int:
    """Epoch milliseconds, rounded down."""
    if isinstance(value, str):
        digits = _DIGITS.fullmatch(value)
        value = int(digits[1]) if digits else _parse_iso(value)
    if isinstance(value, datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        return (aware - _EPOCH) // _MS
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"timestamp is neither a time nor a whole number but {_kind(value)}")
    if not _EARLIEST <= value <= _LATEST:
        raise DataError("timestamp is outside the years 1 to 9999 (expected epoch milliseconds)")
    return value


def _parse_iso(text: str) -> datetime:
    try:
        if _ISO.fullmatch(text):
            return datetime.fromisoformat(text)
    except ValueError:
        pass
    raise DataError("timestamp is neither ISO 8601 nor epoch milliseconds")


def time_order(examples: Sequence[Example]) -> list[int]:
    """Positions from oldest to newest: the one total order of a user's rows.

    Rows without a time come first (nothing says that they are recent). Equal times, and
    rows without one, are ordered by a hash of their content.
    """

    def time_of(position: int) -> tuple[bool, int]:
        stamp = examples[position].timestamp
        return (stamp is not None, stamp or 0)

    result: list[int] = []
    for _, same in groupby(sorted(range(len(examples)), key=time_of), key=time_of):
        group = list(same)
        if len(group) > 1:  # hashing is the dear part, and ties are rare
            group.sort(key=lambda position: _tie_break(examples[position]))
        result += group
    return result


def _tie_break(example: Example) -> tuple[str, str]:
    """Content first, split last: equal rows keep their order when splits are assigned."""
    content = _canonical([_plain(replace(example, split=None))])
    return hashlib.sha256(content).hexdigest(), example.split or ""


def assign_splits(examples: Sequence[Example]) -> list[Split]:
    """The split of each row of one user, in the order given.

    Where no row names one, the last max(2, ceil(n / 5)) rows of `time_order` are valid, the
    others train, none test. Where any row names one, rows without one are train: a user
    whose validation was chosen by hand gets no further rows into it.
    """
    if any(example.split for example in examples):
        return [example.split or "train" for example in examples]
    valid = max(2, -(-len(examples) // 5))
    splits: list[Split] = ["valid"] * len(examples)
    for position in time_order(examples)[:-valid]:
        splits[position] = "train"
    return splits


def select_rows(examples: Sequence[Example], max_rows: int | None) -> list[int]:
    """Positions of the rows of one user to keep, oldest first. Splits must be assigned.

    The newest floor(4/5 max_rows) train rows and ceil(1/5 max_rows) valid rows (40 = 32 + 8);
    a share that is not filled stays empty. Test rows do not count towards `max_rows`: the
    newest ceil(1/5 max_rows) of them are kept besides.
    """
    order = time_order(examples)
    if max_rows is None:
        return order
    fifth = -(-max_rows // 5)
    left = {"train": max_rows - fifth, "valid": fifth, "test": fifth}
    kept = []
    for position in reversed(order):
        split = examples[position].split
        if split is None:
            raise DataError("rows were to be selected before their splits were assigned")
        if left[split]:
            left[split] -= 1
            kept.append(position)
    return kept[::-1]


def arrange(examples: Sequence[Example], max_rows: int | None = None) -> list[Example]:
    """One user's rows as a run keeps them: splits assigned, selected, oldest first."""
    splits = assign_splits(examples)
    rows = [replace(example, split=split) for example, split in zip(examples, splits, strict=True)]
    return [rows[position] for position in select_rows(rows, max_rows)]


def too_few(examples: Sequence[Example], min_examples: int) -> bool:
    """Whether a user cannot be trained: too few train + valid rows, or no valid row.

    Ask before `select_rows`: `max_rows` below `min_examples` makes nobody untrainable.
    """
    train, valid = _usable(examples)
    return train + valid < min_examples or not valid


def why_too_few(examples: Sequence[Example], min_examples: int) -> str:
    """What a user who is too few for `min_examples` lacks."""
    train, valid = _usable(examples)
    return str(
        DataError(
            "the user has too few rows",
            seen=f"{train} train and {valid} valid rows",
            expected=f"at least {min_examples} (data.min_examples), of which 1 valid",
            fix="give the user more rows, or leave their splits out to have some chosen as valid",
        )
    )


def _usable(examples: Sequence[Example]) -> tuple[int, int]:
    splits = [example.split for example in examples]
    return splits.count("train"), splits.count("valid")


def data_digest(examples: Sequence[Example]) -> str:
    """SHA-256 (hex) of one user's rows with their splits, whatever order they come in."""
    return hashlib.sha256(
        _canonical([_plain(examples[position]) for position in time_order(examples)])
    ).hexdigest()


def texts_of(example: Example) -> list[str]:
    """The texts of a row: those of its prompt, then its completion."""
    if example.messages is not None:
        return [turn.content for turn in example.messages]
    return [example.prompt or "", example.completion or ""]


class Fit:
    """Whether rows can be encoded to `max_length` tokens, without encoding most of them.

    A token of most tokenizers stands for at least one byte, so a row whose bytes fit, fits.
    Only the others are encoded as training will encode them (0.5 ms each).
    """

    def __init__(self, template: Template, max_length: int) -> None:
        self._template, self._max_length = template, max_length
        self._overheads: dict[tuple[str, ...] | None, int | str] = {}
        backend = getattr(template.tokenizer, "backend_tokenizer", None)
        # A normalizer may make text longer; plain ASCII is left alone in practice.
        self._ascii_only = backend is None or backend.normalizer is not None
        self._backend = backend

    def supervised(self, examples: Sequence[Example]) -> list[int]:
        """Supervised tokens of each row: its completion and the token that ends it."""
        texts = [texts_of(example)[-1] for example in examples]
        if not texts:
            return []
        if self._backend is None:
            ids = self._template.tokenizer(texts, add_special_tokens=False)["input_ids"]
            return [len(row) + 1 for row in ids]
        self._backend.no_padding()
        self._backend.no_truncation()
        coded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [len(row) + 1 for row in coded]

    def reason(self, example: Example, supervised: int) -> str | None:
        """Why the row cannot be encoded, or None."""
        if supervised == 1:
            return "the completion has no tokens"
        overhead = self._overhead(example)
        if isinstance(overhead, str):
            return overhead
        prompt = texts_of(example)[:-1]
        if not self._ascii_only or all(text.isascii() for text in prompt):
            size = sum(len(text) if text.isascii() else len(text.encode()) for text in prompt)
            if overhead + size + supervised + _SLACK <= self._max_length:
                return None
        try:
            self._template.encode(example, self._max_length)
        except DataError as error:
            return error.message
        return None

    def _overhead(self, example: Example) -> int | str:
        """Tokens that the template adds to turns of these roles, or why it refuses them."""
        turns = example.messages
        roles = None if turns is None else tuple(turn.role for turn in turns[:-1])
        if roles not in self._overheads:
            probe = "x" if roles is None else [Message(role=role, content="x") for role in roles]
            try:
                overhead: int | str = len(self._template.encode_prompt(probe, 1 << 30))
            except DataError as error:
                overhead = error.message
            self._overheads[roles] = overhead
        return self._overheads[roles]


def _plain(example: Example) -> dict[str, object]:
    """The row's set fields. Absent fields are left out, so that new ones change no digest."""
    fields: dict[str, object] = {
        "prompt": example.prompt,
        "completion": example.completion,
        "timestamp": example.timestamp,
        "split": example.split,
        "init_words": example.init_words,
    }
    if example.messages is not None:
        fields["messages"] = [[turn.role, turn.content] for turn in example.messages]
    return {name: value for name, value in fields.items() if value is not None}


def _canonical(value: object) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8")
