"""The index of a partition: one row per user, in files by bucket.

A bucket is a range of user keys. Its index file is named after its contents and shared by all
partitions (`partitions/index/<digest>.parquet`), so a new delivery writes the files of those
buckets only in which a user's rows changed; other users' index rows are copied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.rows.choose import INDEX_SCHEMA, choose_rows
from pipelines.rows.shards import Shards, open_parquet
from pipelines.rows.wanted import Wanted, read_shards
from ptuning.store import Store

BUCKET_ROWS = 500_000  # rows of input per bucket, at most about
_ALPHABET = "234567abcdefghijklmnopqrstuvwxyz"  # of user keys, in the order of the characters
_MOST_BITS = 20


@dataclass(frozen=True, slots=True)
class Bucket:
    """One bucket's index file, and its sums. `digest` is "" where it has no users."""

    first: str
    end: str
    digest: str = ""
    users: int = 0
    too_few: int = 0
    rows: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class IndexRules:
    """The settings that decide an index row. `fit` names the tokenizer's rules (fits.py)."""

    fit: str
    max_rows: int | None
    min_examples: int


@dataclass(frozen=True, slots=True)
class IndexJob:
    """Adjacent buckets to index. `keys` are the sorted keys of the users whose rows changed since
    the buckets `before`, which cover the same range; None: there are no such buckets."""

    root: str
    ranges: tuple[tuple[str, str], ...]
    rules: IndexRules
    keys: Sequence[str] | None = None
    before: tuple[Bucket, ...] = ()


def bucket_ranges(rows: int, bucket_rows: int = BUCKET_ROWS) -> list[tuple[str, str]]:
    """Ranges [first, end) of user keys, a power of two of them, for this number of rows.

    Keys are uniformly distributed. The number only doubles, and each range is then cut in two.
    """
    bits = min(max(0, (-(-rows // bucket_rows) - 1).bit_length()), _MOST_BITS)
    bounds = [_bound(number << (_MOST_BITS - bits)) for number in range(1, 1 << bits)]
    return list(zip(["", *bounds], [*bounds, "~"], strict=True))


def _bound(value: int) -> str:
    return "".join(_ALPHABET[value >> shift & 31] for shift in (15, 10, 5, 0))


def index_buckets(job: IndexJob, shards: Sequence[Shards]) -> list[Bucket]:
    """Write the index files of the job's buckets; `shards` are those of the whole partition."""
    store = Store(job.root)
    wanted = Wanted(job.ranges[0][0], job.ranges[-1][1], job.keys)
    rows = read_shards(store, shards, job.rules.fit, wanted)
    found = choose_rows(rows, max_rows=job.rules.max_rows, min_examples=job.rules.min_examples)
    table = found.index
    if job.keys is not None:
        before = read_index_files(store, job.before, wanted.first, wanted.end)
        changed = pc.is_in(before["user_key"], pa.array(job.keys, pa.string()))
        table = pa.concat_tables([before.filter(pc.invert(changed)), table])
        table = table.sort_by("user_key")
    return [_write_bucket(store, table, *bounds) for bounds in job.ranges]


def _write_bucket(store: Store, table: pa.Table, first: str, end: str) -> Bucket:
    mine = table.filter(Wanted(first, end).mask(table["user_key"]))
    if not mine.num_rows:
        return Bucket(first, end)
    sink = pa.BufferOutputStream()
    pq.write_table(mine.combine_chunks(), sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    digest = hashlib.sha256(data).hexdigest()
    name = _file_name(digest)
    if not store.exists(name):
        store.write(name, data)
    return Bucket(
        first=first,
        end=end,
        digest=digest,
        users=mine.num_rows,
        too_few=pc.sum(mine["too_few"]).as_py(),
        rows=pc.sum(mine["rows"]).as_py(),
    )


def count_shrunk(root: str, before: Sequence[Bucket], now: Sequence[Bucket]) -> int:
    """Users who have fewer usable rows now than before, or none any more. Only buckets with another
    index file are read."""
    store, count = Store(root), 0
    same = {(bucket.first, bucket.end, bucket.digest) for bucket in now}
    for bucket in before:
        if (bucket.first, bucket.end, bucket.digest) in same:
            continue
        columns = ["user_key", "usable"]
        old = read_index_files(store, [bucket]).select(columns).rename_columns(["user_key", "old"])
        new = read_index_files(store, now, bucket.first, bucket.end).select(columns)
        joined = old.join(new, "user_key", join_type="left outer")
        fewer = pc.less(pc.fill_null(joined["usable"], 0), joined["old"])
        count += pc.sum(fewer).as_py() or 0
    return count


def read_index_files(
    store: Store, buckets: Sequence[Bucket], first: str = "", end: str = "~"
) -> pa.Table:
    """The index rows of the users with keys in [first, end), sorted by key."""
    wanted = Wanted(first, end)
    tables = [
        open_parquet(store, _file_name(bucket.digest)).read()
        for bucket in buckets
        if bucket.digest and bucket.first < end and bucket.end > first
    ]
    table = pa.concat_tables([INDEX_SCHEMA.empty_table(), *tables])
    return table.filter(wanted.mask(table["user_key"]))


def iterate_index(store: Store, buckets: Sequence[Bucket]) -> Iterator[pa.Table]:
    """The index, a bucket at a time, by user key."""
    for bucket in buckets:
        if bucket.digest:
            yield open_parquet(store, _file_name(bucket.digest)).read()


def _file_name(digest: str) -> str:
    return f"partitions/index/{digest}.parquet"
