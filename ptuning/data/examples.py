"""Users' rows: validation, order, splits and selection.

Pure functions, without torch. Everything that depends on order uses one total order (time, then a
hash of the row's content), never the order of reading. So the same rows give the same splits,
selection and digest, however they are spread over files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import Field

from ptuning.data.columns import ColumnNames, Columns
from ptuning.data.encode import Template, TemplateKind
from ptuning.data.messages import ROLES, Turn, read_messages, read_turns
from ptuning.data.times import check_time, read_time
from ptuning.data.values import (
    Notes,
    describe_type,
    read_split,
    read_text,
    read_user_id,
    read_weight,
)
from ptuning.errors import DataError
from ptuning.types import SPLITS, Config, Example, Message, Split

_SLACK = 16  # tokens that text and template may take more when tokenised together


class DataConfig(Config):
    """Which rows are used, and how a delivery changes them."""

    SECTION: ClassVar[str] = "data"

    columns: ColumnNames = ColumnNames()
    delivery: Literal["append", "snapshot"] = Field(
        default="append",
        description="append: the input adds to what was delivered to this store before, and a file "
        "that has changed replaces its own earlier rows; snapshot: the input is complete, and what "
        "is missing from it is gone",
    )
    template: TemplateKind = Field(
        default="auto",
        description="prompt format: chat, plain, or auto (chat if the tokenizer has a chat "
        "template)",
    )
    max_length: int = Field(
        default=512,
        ge=8,
        description="maximum tokens of a row, virtual tokens not counted; longer prompts are cut",
    )
    max_rows: int | None = Field(
        default=None,
        ge=2,
        description="keep each user's newest rows, at most this many: 4/5 train, 1/5 valid",
    )
    max_users: int | None = Field(
        default=None, ge=1, description="keep the users with the most rows (ties by id)"
    )
    min_examples: int = Field(
        default=8, ge=1, description="users with fewer train + valid rows are too_few, not trained"
    )
    max_bad_fraction: float = Field(
        default=0.05,
        ge=0.0,
        le=1.0,
        description="the run fails if a larger share of rows is quarantined and, unless this is 1, "
        "if all rows of a file are",
    )
    on_shrink: Literal["base", "keep"] = Field(
        default="base",
        description="for users whose rows are gone or too few now: base: serve the base model; "
        "keep: keep serving the prefix from their earlier rows",
    )
    max_shrink: float = Field(
        default=0.2,
        ge=0.0,
        le=1.0,
        description="the run stops, before it changes anything, if a larger share of the users "
        "would lose their prefix",
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One checked input row. `learned` is False if its weight is 0."""

    user_id: str
    example: Example
    learned: bool = True


_COLUMNS = Columns()


def check_row(
    raw: Mapping[str, object],
    columns: Columns = _COLUMNS,
    folder: Mapping[str, object] = MappingProxyType({}),
    notes: Notes | None = None,
) -> Row:
    """Check a raw row. Raises DataError, whose `message` is a short reason.

    The error has the field `user_id` if the row's user is known. `columns` maps the row's keys to
    fields; `folder` has fields taken from the names of the file's folders, for rows that lack them;
    `notes` counts interpretations worth reporting. None and NaN mean that a value is missing, and
    so does an empty time, split or weight. Example:
    `check_row({"user_id": 7, "prompt": "2+2?", "completion": "4"}).user_id` is "7".
    """
    layout = columns.layout(tuple(raw))
    layout.uses += 1
    values = {}
    for field, source in layout.sources.items():
        value = raw[source]
        if value is not None and value == value:
            values[field] = value
    if layout.input is not None and "prompt" in values:
        values["prompt"] = _with_input(values["prompt"], raw[layout.input], notes)
    user_id = _user_of(values, folder, notes)
    try:
        return _row_of(user_id, {**folder, **values} if folder else values, folder, notes)
    except DataError as error:
        error.fields["user_id"] = user_id
        raise


def _with_input(prompt: object, more: object, notes: Notes | None) -> object:
    """Alpaca's prompt: the instruction, followed by the input if there is one."""
    if notes is not None:
        notes["alpaca", ""] += 1
    if not isinstance(prompt, str) or more is None or more == "" or more != more:
        return prompt
    return f"{prompt}\n\n{read_text(more, 'input')}"


def _user_of(
    values: Mapping[str, object], folder: Mapping[str, object], notes: Notes | None
) -> str:
    stated = folder.get("user_id")
    if "user_id" not in values:
        if stated is None:
            raise DataError("user_id is missing")
        return read_user_id(stated, notes)
    user_id = read_user_id(values["user_id"], notes)
    if stated is not None and stated != user_id:
        raise DataError("user_id differs from that of the file's folder")
    return user_id


def _row_of(
    user_id: str, values: Mapping[str, object], folder: Mapping[str, object], notes: Notes | None
) -> Row:
    prompt, completion = values.get("prompt"), values.get("completion")
    turns: list[Turn] | None = None
    if isinstance(prompt, list) or isinstance(completion, list):
        if "messages" in values:
            raise DataError("the row has both messages and a prompt or completion")
        turns = [*_as_turns(prompt, "user"), *_as_turns(completion, "assistant")]
        prompt = completion = None
    elif "messages" in values:
        turns = read_turns(values["messages"])
    if prompt is not None:
        prompt = read_text(prompt, "prompt", numbers=True)
    if completion is not None:
        completion = read_text(completion, "completion", numbers=True)
    messages = None if turns is None else read_messages(turns, notes)
    _check_shape(prompt, completion, messages)
    split = read_split(values["split"], notes) if "split" in values else None
    if folder and "split" in folder:
        stated = read_split(folder["split"])
        if split not in (None, stated):
            raise DataError("split differs from that of the file's folder")
        split = stated
    words = values.get("init_words")
    example = Example(
        prompt=prompt,
        completion=completion,
        messages=messages,
        timestamp=read_time(values["timestamp"], notes) if "timestamp" in values else None,
        split=split,
        init_words=None if words is None else read_text(words, "init_words"),
    )
    learned = read_weight(values["weight"]) if "weight" in values else True
    if turns and learned:
        learned = read_weight(turns[-1].get("weight"))
    return Row(user_id, example, learned)


def _as_turns(value: object, role: str) -> list[Turn]:
    """The turns of a prompt or completion; one of the two is a list of messages, the other may be
    text."""
    if value is None:
        raise DataError(f"{'prompt' if role == 'user' else 'completion'} is missing")
    if isinstance(value, list):
        return read_turns(value)
    return [{"role": role, "content": value}]


def check_example(example: Example) -> None:
    """Check an Example that a caller made: its types, and the rules of `check_row`. Raises
    DataError."""
    if not isinstance(example, Example):
        raise DataError(
            f"the row is not an Example but {describe_type(example)}",
            seen=repr(example)[:80],
            expected="ptuning.Example(prompt=..., completion=...)",
            fix="convert the rows to Examples",
        )
    for name in ("prompt", "completion", "init_words"):
        text = getattr(example, name)
        if text is not None and not isinstance(text, str):
            raise DataError(f"{name} is not a string but {describe_type(text)}")
        if text is not None:
            read_text(text, name)
    if example.messages is not None:
        _check_messages(example.messages)
    _check_shape(example.prompt, example.completion, example.messages)
    if example.split is not None and example.split not in SPLITS:
        raise DataError(f"split is not one of {', '.join(SPLITS)}", seen=repr(example.split))
    if (stamp := example.timestamp) is not None:
        if type(stamp) is not int:
            raise DataError(
                f"timestamp is not an int but {describe_type(stamp)}",
                seen=repr(stamp),
                expected="epoch milliseconds",
                fix="convert it to an int",
            )
        check_time(stamp)


def _check_messages(turns: Any) -> None:
    typed = isinstance(turns, (list, tuple)) and all(isinstance(turn, Message) for turn in turns)
    messages = read_messages([vars(turn) for turn in turns] if typed else read_turns(turns))
    if not typed:
        raise DataError("messages are not ptuning.Message(role=..., content=...)", seen=turns)
    if messages != tuple(turns):  # files may use other names of roles, but Examples may not
        raise DataError(f"a message's role is not one of {', '.join(ROLES)}", seen=turns)


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


def time_order(examples: Sequence[Example]) -> list[int]:
    """Indices of a user's rows in their total order, oldest first.

    Rows without a time come first, since nothing shows that they are recent. Rows with equal times
    or without one are ordered by a hash of their content.
    """

    def time_of(position: int) -> tuple[bool, int]:
        stamp = examples[position].timestamp
        return (stamp is not None, stamp or 0)

    result: list[int] = []
    for _, same in groupby(sorted(range(len(examples)), key=time_of), key=time_of):
        group = list(same)
        if len(group) > 1:  # hashing is the slow part, and ties are rare
            group.sort(key=lambda position: _tie_break(examples[position]))
        result += group
    return result


def _tie_break(example: Example) -> tuple[bytes, str]:
    """The content's digest, then the split: assigning splits does not reorder rows."""
    return row_digest(example), example.split or ""


def assign_splits(examples: Sequence[Example]) -> list[Split]:
    """The split of each of a user's rows, in the given order.

    If no row has a split, the last max(2, ceil(n / 5)) rows of `time_order` are valid and the
    others train. If any row has one, rows without a split are train: nothing is added to a
    validation split that was chosen by hand.
    """
    if any(example.split for example in examples):
        return [example.split or "train" for example in examples]
    valid = max(2, -(-len(examples) // 5))
    splits: list[Split] = ["valid"] * len(examples)
    for position in time_order(examples)[:-valid]:
        splits[position] = "train"
    return splits


def select_rows(examples: Sequence[Example], max_rows: int | None) -> list[int]:
    """Indices of the user's rows to keep, oldest first. Splits must be assigned.

    Keeps the newest floor(4/5 max_rows) train rows and ceil(1/5 max_rows) valid rows (40 = 32 + 8);
    one split does not take over what another leaves unused. Test rows do not count towards
    `max_rows`: the newest ceil(1/5 max_rows) of them are kept in addition.
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
            raise DataError("rows cannot be selected before their splits are assigned")
        if left[split]:
            left[split] -= 1
            kept.append(position)
    return kept[::-1]


def arrange(examples: Sequence[Example], max_rows: int | None = None) -> list[Example]:
    """One user's rows as a run uses them: with splits, selected, oldest first."""
    splits = assign_splits(examples)
    rows = [replace(example, split=split) for example, split in zip(examples, splits, strict=True)]
    return [rows[position] for position in select_rows(rows, max_rows)]


def too_few(examples: Sequence[Example], min_examples: int) -> bool:
    """Whether a user cannot be trained: too few train + valid rows, or no valid row.

    Call it before `select_rows`: a `max_rows` below `min_examples` must not exclude users.
    """
    train, valid = _usable(examples)
    return train + valid < min_examples or not valid


def why_too_few(examples: Sequence[Example], min_examples: int) -> str:
    """Why a user is `too_few`, as a sentence."""
    train, valid = _usable(examples)
    return str(
        DataError(
            "the user has too few rows",
            seen=f"{train} train and {valid} valid rows",
            expected=f"at least {min_examples} (data.min_examples), including 1 valid",
            fix="add rows for the user, or omit their splits so that valid rows are chosen",
        )
    )


def _usable(examples: Sequence[Example]) -> tuple[int, int]:
    splits = [example.split for example in examples]
    return splits.count("train"), splits.count("valid")


ROW_DIGEST_BYTES = 16
SPLIT_BYTES: Mapping[Split | None, bytes] = MappingProxyType(
    {None: b"-", "test": b"s", "train": b"t", "valid": b"v"}
)


def row_digest(example: Example) -> bytes:
    """SHA-256 of a row's contents but for its split, cut to 16 bytes."""
    return digest_fields(
        example.timestamp,
        example.prompt,
        example.completion,
        example.init_words,
        example.messages or (),
    )


def digest_fields(
    timestamp: int | None,
    prompt: str | None,
    completion: str | None,
    init_words: str | None = None,
    messages: Sequence[Message] = (),
) -> bytes:
    """`row_digest` of a row with these fields.

    The texts follow a head that names the fields and gives their lengths, so that no two rows have
    the same encoding. Fields that are not set are left out: adding a field changes no digest.
    """
    is_usual = init_words is None and not messages
    if is_usual and timestamp is not None and prompt is not None and completion is not None:
        # The same encoding, in one step.
        first, second = prompt.encode("utf-8"), completion.encode("utf-8")
        data = b"t%dp%dc%d:%b%b" % (timestamp, len(first), len(second), first, second)
        return hashlib.sha256(data).digest()[:ROW_DIGEST_BYTES]
    head = "" if timestamp is None else f"t{timestamp}"
    texts = []
    for tag, text in (("p", prompt), ("c", completion), ("w", init_words)):
        if text is not None:
            texts.append(text.encode("utf-8"))
            head += f"{tag}{len(texts[-1])}"
    for turn in messages:
        role, content = turn.role.encode("utf-8"), turn.content.encode("utf-8")
        texts += (role, content)
        head += f"m{len(role)},{len(content)}"
    data = b"".join((head.encode("ascii"), b":", *texts))
    return hashlib.sha256(data).digest()[:ROW_DIGEST_BYTES]


def data_digest(examples: Sequence[Example]) -> str:
    """SHA-256 (hex) of one user's rows with their splits, independent of the given order: of each
    row's digest and split, oldest row first."""
    ordered = (examples[position] for position in time_order(examples))
    return hashlib.sha256(
        b"".join(row_digest(example) + SPLIT_BYTES[example.split] for example in ordered)
    ).hexdigest()


def texts_of(example: Example) -> list[str]:
    """The texts of a row: those of its prompt, then its completion."""
    if example.messages is not None:
        return [turn.content for turn in example.messages]
    return [example.prompt or "", example.completion or ""]


class Fit:
    """Checks whether rows can be encoded to `max_length` tokens, without encoding most of them.

    In most tokenizers a token covers at least one byte, so a row whose bytes fit also fits in
    tokens. Only the other rows are encoded as in training (0.5 ms each).
    """

    def __init__(self, template: Template, max_length: int) -> None:
        self._template, self._max_length = template, max_length
        self._overheads: dict[tuple[str, ...] | None, int | str] = {}
        backend = getattr(template.tokenizer, "backend_tokenizer", None)
        # A normalizer may make text longer, but in practice does not change ASCII.
        self._ascii_only = backend is None or backend.normalizer is not None
        self._backend = backend

    def supervised(self, examples: Sequence[Example]) -> list[int]:
        """The number of supervised tokens of each row: its completion and the end token."""
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
        """How many tokens the template adds to turns with these roles, or why it refuses them."""
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
