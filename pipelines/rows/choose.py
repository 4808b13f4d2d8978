"""Splits, selection and digests of many users' rows at once, on columns.

This is the fast form of `assign_splits`, `select_rows`, `too_few` and `data_digest` in
`ptuning.data.examples`, which work on one user's Examples and are its oracle. It needs no texts:
a row is its user, its time, its split and the digest of its contents.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ptuning.data.examples import ROW_DIGEST_BYTES, SPLIT_BYTES
from ptuning.types import Split

# The splits as codes, in the order in which `time_order` sorts rows that are otherwise equal.
CODES: dict[Split | None, int] = {None: 0, "test": 1, "train": 2, "valid": 3}
SPLIT_OF: dict[int, Split] = {code: split for split, code in CODES.items() if split is not None}
_NONE, _TEST, _TRAIN, _VALID = range(4)
_BYTES = np.frombuffer(b"".join(SPLIT_BYTES[split] for split in CODES), np.uint8)

INDEX_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("user_key", pa.string()),
        ("rows", pa.int64()),
        ("supervised_tokens", pa.int64()),
        ("data_digest", pa.string()),
        ("first_at", pa.int64()),
        ("last_at", pa.int64()),
        ("rows_train", pa.int64()),
        ("rows_valid", pa.int64()),
        ("rows_test", pa.int64()),
        ("usable", pa.int64()),  # train + valid rows before max_rows
        ("too_few", pa.bool_()),
    ]
)
# What `choose_rows` reads of a row.
ROW_COLUMNS = ("user_key", "user_id", "timestamp", "split", "digest", "supervised")

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rows that users keep: `positions` in the given table, by user key and then oldest first,
    their split `codes`, and the users' index rows (INDEX_SCHEMA), by key."""

    positions: Ints
    codes: npt.NDArray[np.int8]
    index: pa.Table


def choose_rows(table: pa.Table, *, max_rows: int | None, min_examples: int) -> Chosen:
    """Assign splits and select rows for every user in a table with ROW_COLUMNS, in any order.

    `timestamp` is in epoch ms or null, `split` a code of CODES, `digest` the row's digest, and
    `supervised` the number of its supervised tokens. The table has all rows of its users.
    """
    if not table.num_rows:
        return Chosen(np.empty(0, np.int64), np.empty(0, np.int8), INDEX_SCHEMA.empty_table())
    user, keys = _users(table)
    split = table["split"].to_numpy().astype(np.int8)
    chosen_by_hand = np.bincount(user, weights=split != _NONE) > 0
    split = np.where((split == _NONE) & chosen_by_hand[user], _TRAIN, split).astype(np.int8)
    times = table["timestamp"].combine_chunks()
    timed = times.is_valid().to_numpy(zero_copy_only=False)
    stamp = times.fill_null(0).to_numpy(zero_copy_only=False)
    digests = _digests(table)
    halves = digests.view(">u8").reshape(-1, 2)
    order = np.lexsort((split, halves[:, 1], halves[:, 0], stamp, timed, user))

    user, split = user[order], split[order]
    begins = _begins(user)
    ends = np.append(begins[1:], len(user))
    counts = ends - begins
    from_end = ends[user] - 1 - np.arange(len(user))
    valid = np.maximum(2, -(-counts // 5))
    assigned = np.where(from_end < valid[user], _VALID, _TRAIN)
    split = np.where(split == _NONE, assigned, split).astype(np.int8)
    usable = {code: np.add.reduceat(split == code, begins) for code in (_TRAIN, _VALID)}
    keep = _newest(split, user, ends, max_rows)

    order, user, split = order[keep], user[keep], split[keep]
    begins = _begins(user)
    rows = {code: np.add.reduceat(split == code, begins) for code in SPLIT_OF}
    kept = np.diff(np.append(begins, len(user)))
    total = usable[_TRAIN] + usable[_VALID]
    index = pa.table(
        [
            table["user_id"].take(pa.array(order[begins])).combine_chunks(),
            keys,
            pa.array(kept),
            pa.array(np.add.reduceat(table["supervised"].to_numpy()[order], begins), pa.int64()),
            pa.array(_data_digests(digests[order], split, begins), pa.string()),
            *_time_range(stamp[order], timed[order], begins, kept),
            pa.array(rows[_TRAIN]),
            pa.array(rows[_VALID]),
            pa.array(rows[_TEST]),
            pa.array(total),
            pa.array((total < min_examples) | (usable[_VALID] == 0)),
        ],
        schema=INDEX_SCHEMA,
    )
    return Chosen(order, split, index)


def _users(table: pa.Table) -> tuple[Ints, pa.Array]:
    """Each row's user as a number, in the order of the user keys; and the keys."""
    coded = table["user_key"].combine_chunks().dictionary_encode()
    names = coded.dictionary
    by_name = pc.sort_indices(names).to_numpy()
    rank = np.empty(len(names), np.int64)
    rank[by_name] = np.arange(len(names))
    return rank[coded.indices.to_numpy()], names.take(pa.array(by_name))


def _digests(table: pa.Table) -> npt.NDArray[np.uint8]:
    """The rows' digests, as bytes [rows, 16]."""
    column = table["digest"].combine_chunks()
    data = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, ROW_DIGEST_BYTES)
    return np.ascontiguousarray(data[column.offset : column.offset + len(column)])


def _begins(user: Ints) -> Ints:
    """The positions at which a new user begins; `user` is sorted."""
    return np.flatnonzero(np.append(True, user[1:] != user[:-1]))


def _newest(
    split: npt.NDArray[np.int8], user: Ints, ends: Ints, max_rows: int | None
) -> npt.NDArray[np.bool_]:
    """Which rows `select_rows` keeps, of rows sorted by user and time."""
    if max_rows is None:
        return np.ones(len(user), np.bool_)
    fifth = -(-max_rows // 5)
    keep = np.zeros(len(user), np.bool_)
    for code, most in ((_TRAIN, max_rows - fifth), (_VALID, fifth), (_TEST, fifth)):
        mine = split == code
        so_far = np.cumsum(mine)
        keep |= mine & (so_far[ends - 1][user] - so_far < most)
    return keep


def _time_range(
    stamp: Ints, timed: npt.NDArray[np.bool_], begins: Ints, counts: Ints
) -> tuple[pa.Array, pa.Array]:
    """Each user's first and last time; null for users without one. Rows without a time come
    first."""
    times = np.add.reduceat(timed, begins)
    ends = begins + counts
    none = times == 0
    first = stamp[np.minimum(ends - times, ends - 1)]
    return pa.array(first, pa.int64(), mask=none), pa.array(stamp[ends - 1], pa.int64(), mask=none)


def _data_digests(
    digests: npt.NDArray[np.uint8], split: npt.NDArray[np.int8], begins: Ints
) -> list[str]:
    """`data_digest` of each user."""
    joined = np.concatenate([digests, _BYTES[split][:, None]], axis=1)
    data, width = memoryview(joined.tobytes()), joined.shape[1]
    bounds = pairwise([*(begins * width).tolist(), len(data)])
    return [hashlib.sha256(data[start:end]).hexdigest() for start, end in bounds]
