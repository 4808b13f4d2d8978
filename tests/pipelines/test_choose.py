"""The choice of rows on columns is what the pure functions choose for each user's Examples."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipelines.rows.choose import CODES, ROW_COLUMNS, SPLIT_OF, choose_rows
from ptuning.data.examples import arrange, assign_splits, data_digest, row_digest, too_few
from ptuning.types import SPLITS, Example, Split

_TYPES = [pa.string(), pa.string(), pa.int64(), pa.int8(), pa.binary(16), pa.int32()]
_TIMES = st.none() | st.integers(-3, 3)
_BY_HAND: st.SearchStrategy[Split | None] = st.sampled_from([None, *SPLITS])


def _user(splits: st.SearchStrategy[Split | None]) -> st.SearchStrategy[list[Example]]:
    """Rows with equal times and equal texts."""
    texts = st.sampled_from(["a", "b", "c"])
    row = st.builds(
        lambda prompt, time, split: Example(
            prompt=prompt, completion="c", timestamp=time, split=split
        ),
        texts,
        _TIMES,
        splits,
    )
    return st.lists(row, min_size=1, max_size=14)


_USERS = st.dictionaries(
    st.text("abc", min_size=1, max_size=3), _user(st.none()) | _user(_BY_HAND), max_size=5
)


@given(_USERS, st.none() | st.integers(2, 12), st.integers(1, 9), st.randoms())
def test_columns_and_examples_give_the_same(
    users: dict[str, list[Example]], max_rows: int | None, least: int, random: object
) -> None:
    rows = [(key, example) for key, examples in users.items() for example in examples]
    random.shuffle(rows)  # type: ignore[attr-defined]
    columns = [
        [key for key, _ in rows],
        [f"id of {key}" for key, _ in rows],
        [example.timestamp for _, example in rows],
        [CODES[example.split] for _, example in rows],
        [row_digest(example) for _, example in rows],
        [number + 2 for number in range(len(rows))],
    ]
    arrays = [pa.array(values, kind) for values, kind in zip(columns, _TYPES, strict=True)]
    table = pa.table(arrays, names=list(ROW_COLUMNS))
    chosen = choose_rows(table, max_rows=max_rows, min_examples=least)

    found: dict[str, list[Example]] = {}
    tokens: dict[str, int] = dict.fromkeys(users, 0)
    for position, code in zip(chosen.positions.tolist(), chosen.codes.tolist(), strict=True):
        key, example = rows[position]
        found.setdefault(key, []).append(replace(example, split=SPLIT_OF[code]))
        tokens[key] += position + 2
    assert found == {key: arrange(examples, max_rows) for key, examples in users.items()}
    assert [*found] == sorted(users)
    index = chosen.index.to_pylist()
    assert [row["user_key"] for row in index] == sorted(users)
    for row in index:
        kept, examples = found[row["user_key"]], users[row["user_key"]]
        splits = assign_splits(examples)
        whole = [replace(one, split=split) for one, split in zip(examples, splits, strict=True)]
        times = [example.timestamp for example in kept if example.timestamp is not None]
        assert row == {
            "user_id": f"id of {row['user_key']}",
            "user_key": row["user_key"],
            "rows": len(kept),
            "supervised_tokens": tokens[row["user_key"]],
            "data_digest": data_digest(kept),
            "first_at": min(times, default=None),
            "last_at": max(times, default=None),
            **{f"rows_{split}": [one.split for one in kept].count(split) for split in SPLITS},
            "usable": len(whole) - splits.count("test"),
            "too_few": too_few(whole, least),
        }
