"""Rows are checked strictly. Splits, selection and digests ignore the order of reading."""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from functools import cache
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import make_tokenizer

from ptuning.data.columns import COLUMN_ALIASES, FIELDS, INPUT, ROW_RULES, ColumnNames, Columns
from ptuning.data.encode import Template
from ptuning.data.examples import (
    DataConfig,
    Fit,
    arrange,
    assign_splits,
    check_example,
    check_row,
    data_digest,
    select_rows,
    time_order,
    too_few,
)
from ptuning.data.messages import ROLE_NAMES
from ptuning.data.times import EpochMs
from ptuning.data.values import SPLIT_NAMES, Notes
from ptuning.errors import ConfigError, DataError
from ptuning.types import Example, Message

GOOD = {"user_id": "alice", "prompt": "a question", "completion": "an answer"}
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def row(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (GOOD | changes).items() if value is not ...}


def example(number: int, time: int | None = None, **changes: Any) -> Example:
    return Example(prompt=f"p{number}", completion=f"c{number}", timestamp=time, **changes)


def test_a_good_row_becomes_an_example_of_its_user() -> None:
    checked = check_row(row(timestamp=5, split="test", init_words="be brief", extra=1))
    assert checked.user_id == "alice"
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
    optional = dict.fromkeys(("messages", "timestamp", "split", "weight", "init_words"), absent)
    assert check_row(row(**optional)).example == check_row(row()).example
    with pytest.raises(DataError, match="user_id is missing"):
        check_row(row(user_id=absent))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"user_id": ...}, "user_id is missing"),
        ({"user_id": ""}, "user_id is empty"),
        ({"user_id": True}, "user_id is not a string but bool"),
        ({"user_id": 7.5}, "user_id is not an integer (write it as text)"),
        ({"user_id": 2.0**60}, "user_id is not an integer (write it as text)"),
        ({"user_id": UUID(int=7).bytes}, "user_id is raw bytes (write it as text)"),
        ({"user_id": b"\xff"}, "user_id is not valid UTF-8"),
        ({"user_id": b""}, "user_id is empty"),
        ({"user_id": ["x"]}, "user_id is not a string but a list"),
        ({"user_id": "a\ud800"}, "user_id is not valid UTF-8"),
        ({"prompt": ...}, "prompt is missing"),
        ({"prompt": 3.5}, "prompt is not a string but float"),
        ({"completion": True}, "completion is not a string but bool"),
        (
            {"completion": [{"role": "assistant", "content": "x"}], "prompt": ...},
            "prompt is missing",
        ),
        ({"completion": ...}, "completion is missing"),
        ({"completion": ""}, "completion is empty"),
        ({"completion": "\udcff"}, "completion is not valid UTF-8"),
        ({"prompt": ..., "completion": ...}, "prompt, completion or messages is missing"),
        ({"messages": TURNS}, "the row has both messages and a prompt or completion"),
        ({"split": "holdout"}, "split is not one of train, valid, test but 'holdout'"),
        ({"split": 1}, "split is not a string but int"),
        ({"init_words": ["x"]}, "init_words is not a string but a list"),
        ({"weight": 0.5}, "weight is neither 0 nor 1"),
        ({"weight": "heavy"}, "weight is neither 0 nor 1"),
        ({"timestamp": "yesterday"}, "timestamp is neither ISO 8601, RFC 2822 nor an epoch time"),
        ({"timestamp": "2024-13-01"}, "timestamp is neither ISO 8601, RFC 2822 nor"),
        ({"timestamp": "Wed, 01 May 2024 10:00:00 CEST"}, "timestamp is neither ISO 8601,"),
        ({"timestamp": True}, "timestamp is neither a time nor a number but bool"),
        ({"timestamp": [1]}, "timestamp is neither a time nor a number but a list"),
        ({"timestamp": float("inf")}, "timestamp is not a finite number"),
        ({"timestamp": 10**22}, "timestamp is outside the years 1 to 9999"),
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
        ("hello", "messages is not valid JSON"),
        ("7", "messages is not a list but int"),
        ({"role": ["user"], "content": []}, "messages is an object of lists that differ in length"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]], "a message has a part"),
        ([TURNS[0], {"role": "assistant", "content": None, "tool_calls": [1]}], "completion is"),
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
    ids = {check_row(row(user_id=one)).user_id for one in (composed, decomposed)}
    assert ids == {composed, decomposed}


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (7, "7"),
        (7.0, "7"),
        (Decimal(7), "7"),
        (Decimal("7E+1"), "70"),
        (Decimal(2**63), str(2**63)),
        (UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        ("caf\u00e9".encode(), "caf\u00e9"),
        ("7.0", "7.0"),
    ],
)
def test_a_user_whose_id_is_typed_differently_is_the_same_user(written: object, text: str) -> None:
    notes = Notes()
    assert check_row(row(user_id=written), notes=notes).user_id == text
    assert bool(notes) == isinstance(written, (int, float, Decimal))


@pytest.mark.parametrize(
    ("written", "split"),
    [
        ("Train", "train"),
        ("validation", "valid"),
        ("val", "valid"),
        ("dev", "valid"),
        ("EVAL", "valid"),
        (" test ", "test"),
        (b"train", "train"),
        ("", None),
    ],
)
def test_the_usual_names_of_splits_are_read(written: object, split: str | None) -> None:
    assert check_row(row(split=written)).example.split == split


@pytest.mark.parametrize(("weight", "learned"), [(0, False), (1, True), ("0", False), (0.0, False)])
def test_rows_of_weight_zero_are_not_learned_from(weight: object, learned: bool) -> None:
    turns = [TURNS[0] | {"weight": 0}, TURNS[1] | {"weight": weight}]
    assert check_row(row(weight=weight)).learned is learned
    assert check_row(row(prompt=..., completion=..., messages=turns)).learned is learned
    assert check_row(row(weight=None)).learned is check_row(row(weight="")).learned is True


def test_the_columns_of_rows_may_have_other_names() -> None:
    columns = Columns(ColumnNames(user_id="author", completion="reply"))
    raw = {"author": "ann", "user_id": "x", "Prompt": "q", "reply": "a", "output": "z"}
    checked = check_row(raw, columns)
    assert (checked.user_id, checked.example.prompt, checked.example.completion) == (
        "ann",
        "q",
        "a",
    )
    assert columns.unknown() == {"user_id": 1, "output": 1}
    with pytest.raises(DataError, match="user_id is missing"):
        check_row(row(), columns)  # a column that was named is not replaced by another


@pytest.mark.parametrize("name", ["USER_ID", " user_id", "User ID", "userId", "user-id"])
def test_case_and_blanks_of_column_names_do_not_matter(name: str) -> None:
    assert check_row({**row(user_id=...), name: "ann"}).user_id == "ann"


def test_a_field_with_two_possible_columns_is_refused() -> None:
    assert check_row({**row(), "USER_ID": "bob"}).user_id == "alice"  # the exact name is clear
    with pytest.raises(DataError, match="occurs twice"):
        check_row({**row(user_id=...), "USER_ID": "ann", "User_Id": "bob"})


@pytest.mark.parametrize(
    ("raw", "prompt", "completion"),
    [
        ({"instruction": "do", "input": "this", "output": "a"}, "do\n\nthis", "a"),
        ({"instruction": "do", "input": "", "output": "a"}, "do", "a"),
        ({"instruction": "do", "output": "a"}, "do", "a"),
        ({"prompt": "q", "completion": "a", "instruction": "x", "output": "y"}, "q", "a"),
        ({"instruction": "do", "output": "a", "conversations": "?"}, "do", "a"),
        ({"prompt": "q", "completion": 1}, "q", "1"),
    ],
)
def test_prompts_and_completions_by_their_other_names_and_types(
    raw: dict[str, Any], prompt: str, completion: str
) -> None:
    example = check_row({"user_id": "ann", **raw}).example
    assert (example.prompt, example.completion) == (prompt, completion)


def test_an_input_is_joined_to_an_instruction_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alpaca's `input` belongs to `instruction`. Beside another prompt it is a separate column."""
    monkeypatch.setitem(COLUMN_ALIASES, "prompt", ("instruction", "question"))
    raw = {"user_id": "ann", "question": "what?", "input": "sensor 7", "output": "a"}
    columns = Columns()
    assert check_row(raw, columns).example.prompt == "what?"
    assert columns.unknown() == {"input": 1}


@pytest.mark.parametrize(
    "raw",
    [
        {"messages": TURNS},
        {"messages": json.dumps(TURNS)},
        {"messages": json.dumps(TURNS).encode()},
        {"messages": [list(turn.items()) for turn in TURNS]},
        {"messages": {name: [turn[name] for turn in TURNS] for name in ("role", "content")}},
        {"messages": [t | {"content": [{"type": "text", "text": t["content"]}]} for t in TURNS]},
        {"messages": [t | {"content": [t["content"][:1], t["content"][1:]]} for t in TURNS]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"conversations": TURNS, "instruction": "be brief"},  # alone, it is not a prompt
        {"conversations": TURNS, "output": "hello"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"prompt": TURNS[:1], "completion": "hello"},
        {"prompt": "hi", "completion": TURNS[1:]},
    ],
)
def test_the_usual_shapes_of_a_conversation_are_the_same_row(raw: dict[str, Any]) -> None:
    assert check_row({"user_id": "ann", **raw}).example == Example(
        messages=(Message(role="user", content="hi"), Message(role="assistant", content="hello"))
    )


def test_developer_and_function_turns_and_bare_tool_calls_are_kept() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}
    turns = [
        {"role": "developer", "content": "be kind"},
        call,
        {"role": "function", "content": "12"},
        *TURNS,
    ]
    notes = Notes()
    messages = check_row({"user_id": "a", "messages": turns}, notes=notes).example.messages or ()
    assert [turn.role for turn in messages[:3]] == ["system", "assistant", "tool"]
    assert messages[1].content == ""
    assert notes == {("tool_call", ""): 1}


def test_an_example_of_the_library_has_the_roles_that_templates_know() -> None:
    answer = Message(role="assistant", content="a")
    check_example(Example(messages=(Message(role="user", content="q"), answer)))
    with pytest.raises(DataError, match="role is not one of"):
        check_example(Example(messages=(Message(role="developer", content="q"), answer)))


@pytest.mark.parametrize(
    ("folder", "changes", "user_id", "split"),
    [
        ({"user_id": "ann"}, {"user_id": ...}, "ann", None),
        ({"user_id": "7"}, {"user_id": 7}, "7", None),
        ({"split": "test"}, {}, "alice", "test"),
        ({"split": "validation"}, {"split": "valid"}, "alice", "valid"),
    ],
)
def test_what_a_folder_states_holds_for_rows_that_do_not_say_it(
    folder: dict[str, str], changes: dict[str, Any], user_id: str, split: str | None
) -> None:
    checked = check_row(row(**changes), folder=folder)
    assert (checked.user_id, checked.example.split) == (user_id, split)


@pytest.mark.parametrize("folder", [{"user_id": "bob"}, {"split": "test"}])
def test_a_row_that_contradicts_its_folder_is_refused(folder: dict[str, str]) -> None:
    with pytest.raises(DataError, match="differs from that of the file's folder"):
        check_row(row(split="train"), folder=folder)


def test_a_bad_row_names_its_user_where_it_has_one() -> None:
    with pytest.raises(DataError) as caught:
        check_row(row(completion=""))
    assert caught.value.fields["user_id"] == "alice"


# The digests of parsed rows, by ROW_RULES. Never change an entry: partitions depend on it.
KNOWN_RULES = {2: "1d822842ef74bc58", 3: "15ca8afecef347d2"}


def test_an_older_partition_is_never_taken_for_rows_read_by_newer_rules() -> None:
    """If this fails, the meaning of raw rows has changed: raise ROW_RULES and add the digest."""
    bases: list[dict[str, Any]] = [row(), {"user_id": 7, "messages": TURNS}]
    bases += [{"user_id": b"a", "conversations": [{"from": "human", "value": "q"}, *TURNS]}]
    bases += [{"user_id": "a", "conversations": TURNS, "instruction": "q"}]
    bases += [{"USER ID": "a", "instruction": "q", "input": "x", "output": 1}]
    changes: list[dict[str, Any]] = [{}, {"weight": 0}, {"weight": 2}, {"split": "dev"}]
    changes += [{"timestamp": 10**power * 3 + 7} for power in range(20)]
    changes += [{"timestamp": text} for text in ("2024-05-01", "2024-05-01 10:00 UTC", "", "x")]
    outcomes = []
    for base in bases:
        for change in changes:
            try:
                checked = check_row(base | change)
                outcome = [checked.user_id, repr(checked.example), str(checked.learned)]
            except DataError as error:
                outcome = [error.message]
            outcomes.append(outcome)
    rules = [FIELDS, COLUMN_ALIASES, INPUT, ROLE_NAMES, SPLIT_NAMES, outcomes]
    digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]
    assert KNOWN_RULES.get(ROW_RULES) == digest, (
        f"the rules have changed: raise ROW_RULES in ptuning/data/columns.py, and add "
        f"{digest!r} to KNOWN_RULES under the new number"
    )


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
        "2024-03-01 12:00:00.250 UTC",
        "2024-03-01 14:00:00.250 +02:00",
        "2024-03-01 14:00:00.250+02",
        MOMENT_MS,
        float(MOMENT_MS),
        str(MOMENT_MS),
        f"{MOMENT_MS}.0",
        Decimal(MOMENT_MS),
        MOMENT_MS / 1000,
        str(MOMENT_MS / 1000),
        Decimal(MOMENT_MS) / 1000,
        MOMENT_MS * 1000 + 999,
        MOMENT_MS * 1_000_000,
        EpochMs(MOMENT_MS),
    ],
)
def test_every_way_to_write_a_time_gives_the_same_milliseconds(written: object) -> None:
    assert check_row(row(timestamp=written)).example.timestamp == MOMENT_MS


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("Fri, 01 Mar 2024 12:00:00 GMT", 1_709_294_400_000),
        ("1 Mar 2024 14:00:00 +0200", 1_709_294_400_000),
        (1_709_294_400, 1_709_294_400_000),
        ("1709294400.0", 1_709_294_400_000),
        (946_684_800, 946_684_800_000),  # 2000, nine digits
        (-1_709_294_400, -1_709_294_400_000),
        (date(2024, 3, 1), 1_709_251_200_000),
        ("2024-03-01", 1_709_251_200_000),
        (EpochMs(1_000_000_000), 1_000_000_000),  # a typed time in January 1970
        (12, 12),  # a count of rows
        ("", None),
        (" ", None),
        ("NaT", None),
    ],
)
def test_times_are_read_in_the_unit_that_their_size_tells(
    written: object, expected: int | None
) -> None:
    assert check_row(row(timestamp=written)).example.timestamp == expected


@given(st.integers(10**8, 4 * 10**9))
def test_a_log_of_seconds_and_milliseconds_is_in_the_order_of_its_times(second: int) -> None:
    written = [second, (second + 1) * 1000, (second + 2) * 10**6, float(second + 3)]
    times = [check_row(row(timestamp=one)).example.timestamp for one in written]
    assert times == [(second + later) * 1000 for later in range(4)]


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
    with pytest.raises(ConfigError):
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
def test_fit_agrees_with_encoding(
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
