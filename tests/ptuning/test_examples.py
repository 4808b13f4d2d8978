"""Rows are checked strictly, and splits, selection and digests ignore the order of reading."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_model import make_tokenizer

from ptuning.data.encode import Template
from ptuning.data.examples import (
    DataConfig,
    Fit,
    arrange,
    assign_splits,
    check_row,
    data_digest,
    select_rows,
    time_order,
    too_few,
)
from ptuning.errors import DataError
from ptuning.types import Example, Message, user_key

GOOD = {"user_id": "alice", "prompt": "a question", "completion": "an answer"}
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def row(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (GOOD | changes).items() if value is not ...}


def example(number: int, time: int | None = None, **changes: Any) -> Example:
    return Example(prompt=f"p{number}", completion=f"c{number}", timestamp=time, **changes)


def test_a_good_row_becomes_an_example_under_its_users_key() -> None:
    checked = check_row(row(timestamp=5, split="test", init_words="be brief", extra=1))
    assert checked.user_id == "alice"
    assert checked.user_key == user_key("alice")
    assert checked.example == Example(
        prompt="a question",
        completion="an answer",
        timestamp=5,
        split="test",
        init_words="be brief",
    )


def test_messages_become_turns() -> None:
    checked = check_row(row(prompt=..., completion=..., messages=TURNS))
    assert checked.example.messages == (
        Message(role="user", content="hi"),
        Message(role="assistant", content="hello"),
    )


@pytest.mark.parametrize("absent", [None, float("nan")])
def test_none_and_nan_mean_absent(absent: object) -> None:
    optional = dict.fromkeys(("messages", "timestamp", "split", "init_words"), absent)
    assert check_row(row(**optional)).example == check_row(row()).example
    with pytest.raises(DataError, match="user_id is missing"):
        check_row(row(user_id=absent))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"user_id": ...}, "user_id is missing"),
        ({"user_id": ""}, "user_id is empty"),
        ({"user_id": 7}, "user_id is not a string but int"),
        ({"user_id": b"x"}, "user_id is not a string but bytes"),
        ({"user_id": "a\ud800"}, "user_id is not valid UTF-8"),
        ({"prompt": ...}, "prompt is missing"),
        ({"prompt": 3}, "prompt is not a string but int"),
        ({"completion": ...}, "completion is missing"),
        ({"completion": ""}, "completion is empty"),
        ({"completion": "\udcff"}, "completion is not valid UTF-8"),
        ({"prompt": ..., "completion": ...}, "prompt, completion or messages is missing"),
        ({"messages": TURNS}, "the row has both messages and a prompt or completion"),
        ({"split": "dev"}, "split is not one of train, valid, test"),
        ({"split": 1}, "split is not a string but int"),
        ({"init_words": ["x"]}, "init_words is not a string but a list"),
        ({"timestamp": "yesterday"}, "timestamp is neither ISO 8601 nor epoch milliseconds"),
        ({"timestamp": "2024-13-01"}, "timestamp is neither ISO 8601 nor epoch milliseconds"),
        ({"timestamp": ""}, "timestamp is neither ISO 8601 nor epoch milliseconds"),
        ({"timestamp": True}, "timestamp is neither a time nor a whole number but bool"),
        ({"timestamp": 1.5}, "timestamp is neither a time nor a whole number but float"),
        ({"timestamp": [1]}, "timestamp is neither a time nor a whole number but a list"),
        ({"timestamp": 1_700_000_000_000_000_000}, "timestamp is outside the years 1 to 9999"),
    ],
)
def test_a_bad_row_is_refused_with_a_short_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        check_row(row(**changes))
    assert caught.value.message.startswith(reason)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is empty"),
        ("hello", "messages is not a list but str"),
        ([1], "a message is not an object but int"),
        (TURNS[:1], "the last message is not from the assistant"),
        ([{"role": "robot", "content": "x"}, *TURNS], "a message's role is not one of"),
        ([{"role": "user"}, *TURNS], "a message's content is not a string but missing"),
        ([TURNS[0], {"role": "assistant", "content": ""}], "completion is empty"),
        ([{"role": "user", "content": "\ud800"}, *TURNS], "a message's content is not valid UTF-8"),
    ],
)
def test_bad_messages_are_refused_with_a_short_reason(messages: object, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        check_row(row(prompt=..., completion=..., messages=messages))
    assert caught.value.message.startswith(reason)


@pytest.mark.parametrize("user_id", [" ", " alice ", "../../x", "a\nb", "<script>", "x" * 9000])
def test_an_id_is_taken_as_it_is(user_id: str) -> None:
    assert check_row(row(user_id=user_id)).user_id == user_id


def test_ids_that_differ_by_normalisation_are_different_users() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    keys = {check_row(row(user_id=one)).user_key for one in (composed, decomposed)}
    assert len(keys) == 2


MOMENT = datetime(2024, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)
MOMENT_MS = 1_709_294_400_250


@pytest.mark.parametrize(
    "written",
    [
        MOMENT,
        MOMENT.replace(tzinfo=None),
        MOMENT.astimezone(timezone(timedelta(hours=5, minutes=30))),
        "2024-03-01T12:00:00.250Z",
        "2024-03-01 12:00:00.250",
        "2024-03-01T14:00:00.250+02:00",
        MOMENT_MS,
        float(MOMENT_MS),
        str(MOMENT_MS),
        f"{MOMENT_MS}.0",
    ],
)
def test_every_way_to_write_a_time_gives_the_same_milliseconds(written: object) -> None:
    assert check_row(row(timestamp=written)).example.timestamp == MOMENT_MS


def test_times_before_1970_are_rounded_down() -> None:
    early = datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    assert check_row(row(timestamp=early)).example.timestamp == -1


# --- splits, selection, digest ---------------------------------------------------------------


@given(st.integers(1, 200))
def test_the_last_fifth_by_time_is_validation(n: int) -> None:
    splits = assign_splits([example(i, time=1000 - i) for i in range(n)])
    valid = min(n, max(2, math.ceil(n / 5)))
    assert splits == ["valid"] * valid + ["train"] * (n - valid)


def test_where_any_row_names_its_split_the_others_are_train() -> None:
    rows = [example(0, 3), example(1, 2, split="test"), example(2, 1, split="valid")]
    assert assign_splits(rows) == ["train", "test", "valid"]


def test_forty_rows_are_thirty_two_and_eight() -> None:
    rows = arrange([example(i, i) for i in range(1000)], max_rows=40)
    assert [row.split for row in rows] == ["train"] * 32 + ["valid"] * 8
    assert [row.timestamp for row in rows] == [*range(768, 800), *range(992, 1000)]


def test_test_rows_do_not_count_towards_max_rows() -> None:
    rows = [example(i, i, split=split) for i, split in enumerate(["train", "valid", "test"] * 50)]
    kept = [rows[position].split for position in select_rows(rows, 10)]
    assert {split: kept.count(split) for split in ("train", "valid", "test")} == {
        "train": 8,
        "valid": 2,
        "test": 2,
    }


@pytest.mark.parametrize("max_rows", [2, 3, 4, 5, 7])
def test_the_smallest_selections_keep_a_row_of_each_kind(max_rows: int) -> None:
    kept = arrange([example(i, i) for i in range(20)], max_rows)
    assert len(kept) == max_rows
    assert {row.split for row in kept} == {"train", "valid"}


def test_rows_without_splits_cannot_be_selected() -> None:
    with pytest.raises(DataError, match="before their splits"):
        select_rows([example(0)], 5)


examples = st.builds(
    Example,
    prompt=st.sampled_from(["a", "b"]),
    completion=st.sampled_from(["x", "y", "z"]),
    timestamp=st.none() | st.integers(0, 4),
    split=st.none() | st.sampled_from(["train", "valid", "test"]),
)


@given(
    st.one_of(
        st.lists(examples, max_size=25),
        st.lists(examples.map(lambda one: replace(one, split=None)), max_size=25),
    ),
    st.none() | st.integers(2, 12),
    st.randoms(use_true_random=False),
)
def test_order_of_reading_changes_nothing(
    rows: list[Example], max_rows: int | None, rng: random.Random
) -> None:
    shuffled = rng.sample(rows, len(rows))
    one, other = arrange(rows, max_rows), arrange(shuffled, max_rows)
    assert one == other
    assert data_digest(one) == data_digest(other) == data_digest(rng.sample(one, len(one)))


@given(st.lists(examples, max_size=25))
def test_every_row_is_kept_without_a_limit_duplicates_too(rows: list[Example]) -> None:
    assert sorted(time_order(rows)) == list(range(len(rows)))
    assert len(arrange(rows)) == len(rows)


def test_rows_without_a_time_are_the_oldest() -> None:
    rows = [example(0, 5), example(1), example(2, -7)]
    assert time_order(rows) == [1, 2, 0]


def test_the_digest_changes_with_every_field() -> None:
    base = example(0, 1, split="train")
    others = [
        replace(base, prompt="q"),
        replace(base, completion="q"),
        replace(base, timestamp=2),
        replace(base, split="valid"),
        replace(base, init_words="q"),
        Example(messages=(Message(role="assistant", content="q"),), timestamp=1, split="train"),
    ]
    digests = {data_digest([one]) for one in (base, *others)} | {data_digest([base, base])}
    assert len(digests) == len(others) + 2


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (["train"] * 6 + ["valid"] * 2, False),
        (["train"] * 5 + ["valid"] * 2 + ["test"] * 9, True),
        (["train"] * 30, True),
        ([], True),
    ],
)
def test_too_few_counts_train_and_valid_and_wants_a_valid_row(
    splits: list[Any], expected: bool
) -> None:
    assert too_few([example(i, split=split) for i, split in enumerate(splits)], 8) is expected


@pytest.mark.parametrize(
    "bad",
    [{"max_rows": 1}, {"max_bad_fraction": 1.5}, {"buckets": 0}, {"template": "x"}, {"oops": 1}],
)
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataConfig(**bad)


# --- fit ---------------------------------------------------------------------------------------

MESSAGES_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@cache
def template_of(kind: str) -> Template:
    tokenizer = make_tokenizer()
    if kind == "chat":
        tokenizer.chat_template = MESSAGES_TEMPLATE
    return Template.of(tokenizer)


@given(
    st.sampled_from(["plain", "chat"]),
    TEXT,
    TEXT.filter(bool),
    st.none() | st.lists(st.sampled_from(["system", "user", "assistant"]), max_size=3),
    st.integers(8, 120),
)
def test_fit_says_what_encoding_says(
    kind: str, prompt: str, completion: str, roles: list[str] | None, max_length: int
) -> None:
    template = template_of(kind)
    row = Example(prompt=prompt, completion=completion)
    if roles is not None:
        turns = [Message(role=role, content=prompt) for role in roles]
        row = Example(messages=(*turns, Message(role="assistant", content=completion)))
    fit = Fit(template, max_length)
    supervised = fit.supervised([row])[0]
    try:
        expected = template.encode(row, max_length).supervised
    except DataError:
        assert fit.reason(row, supervised) is not None
    else:
        assert fit.reason(row, supervised) is None
        assert supervised == expected
