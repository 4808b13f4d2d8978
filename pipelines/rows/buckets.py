"""The work of partitioning on one machine: raw pieces to shards, shards to finished buckets.

A shard holds one block of checked rows as Arrow record batches, one per bucket, so that a
bucket later reads its own part of every shard. Which shards count is what the tasks
returned, not what lies in the folder: a task that died and ran again is counted once. The
rows of a bucket are then gathered whole, and only there are users put together: no block
boundary can cut a user in two. The price is that a bucket must fit into a task's memory.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.rows.inputs import UNREADABLE, InputFile, Piece, open_binary, read_piece, unreadable
from ptuning.data.encode import Template
from ptuning.data.examples import (
    DataConfig,
    Fit,
    assign_splits,
    check_row,
    data_digest,
    select_rows,
    texts_of,
    too_few,
)
from ptuning.errors import DataError
from ptuning.store import Store
from ptuning.types import Example, Message, user_key

BAD = -1  # the bucket of quarantined rows in a shard
_BUCKET_BYTES = 32 << 20
_EXPANSION = {".gz": 4, ".parquet": 4}  # text bytes for one byte of a compressed file, roughly

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_EXAMPLE = [
    ("timestamp", pa.int64()),
    ("prompt", pa.string()),
    ("completion", pa.string()),
    ("messages", _MESSAGES),
    ("split", pa.string()),
    ("init_words", pa.string()),
]
BUCKET_SCHEMA = pa.schema([("user_id", pa.string()), ("user_key", pa.string()), *_EXAMPLE])
QUARANTINE_SCHEMA = pa.schema(
    [("source_file", pa.string()), ("row", pa.int64()), ("reason", pa.string())]
)
INDEX_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("user_key", pa.string()),
        ("bucket", pa.int32()),
        ("rows", pa.int64()),
        ("supervised_tokens", pa.int64()),
        ("data_digest", pa.string()),
        ("first_at", pa.int64()),
        ("last_at", pa.int64()),
        ("rows_train", pa.int64()),
        ("rows_valid", pa.int64()),
        ("rows_test", pa.int64()),
        ("too_few", pa.bool_()),
    ]
)
_SHARD_SCHEMA = pa.schema(
    [("bucket", pa.int32()), *QUARANTINE_SCHEMA, ("user_id", pa.string()), *_EXAMPLE]
)


def bucket_of(user_id: str, buckets: int) -> int:
    """Where a user's rows lie: SHA-256 of the id as a number, modulo the number of buckets."""
    return int.from_bytes(hashlib.sha256(user_id.encode("utf-8")).digest(), "big") % buckets


def bucket_folder(partition_id: str, bucket: int) -> str:
    """A bucket's folder, relative to the store's root."""
    return f"partitions/{partition_id}/user_bucket={bucket:05d}"


# --- pieces to blocks ----------------------------------------------------------------------


def read_blocks(pieces: Sequence[Piece], buckets: int, block_bytes: int) -> Iterator[pa.Table]:
    """Checked rows of pieces in blocks of about `block_bytes` of text, bad rows among them.

    A file that breaks off in the middle gives a bad row numbered 0.
    """
    block, size = _Block(), 0
    for piece in pieces:
        try:
            for number, raw in read_piece(piece):
                if isinstance(raw, str):
                    block.bad(piece, number, raw)
                    size += 64
                else:
                    size += block.check(piece, number, raw, buckets)
                if size >= block_bytes:
                    yield block.table()
                    block, size = _Block(), 0
        except (*UNREADABLE, DataError) as error:
            block.bad(piece, 0, str(unreadable(piece.file, error)))
    if block.count:
        yield block.table()


class _Block:
    """Columns of a shard's table as they fill."""

    def __init__(self) -> None:
        self._columns: dict[str, list[object]] = {name: [] for name in _SHARD_SCHEMA.names}
        self.count = 0

    def bad(self, piece: Piece, number: int, reason: str) -> None:
        self._add(bucket=BAD, source_file=_name(piece), row=number, reason=_clean(reason))

    def check(self, piece: Piece, number: int, raw: dict[str, object], buckets: int) -> int:
        """Add one raw row; about how many bytes of text it holds."""
        try:
            row = check_row(raw)
        except DataError as error:
            self.bad(piece, number, error.message)
            return 64
        self._add(
            bucket=bucket_of(row.user_id, buckets),
            source_file=_name(piece),
            row=number,
            user_id=row.user_id,
            **example_values(row.example),
        )
        return 64 + sum(len(text) for text in texts_of(row.example))

    def _add(self, **values: object) -> None:
        for name, column in self._columns.items():
            column.append(values.get(name))
        self.count += 1

    def table(self) -> pa.Table:
        return pa.table(self._columns, schema=_SHARD_SCHEMA)


def _name(piece: Piece) -> str:
    return _clean(piece.file.url)


def _clean(text: str) -> str:
    """Text that can be written as UTF-8, whatever a file is called."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def example_values(example: Example) -> dict[str, object]:
    """An example as the values of the files' columns."""
    values = {name: getattr(example, name) for name, _ in _EXAMPLE}
    if example.messages is not None:
        values["messages"] = [
            {"role": turn.role, "content": turn.content} for turn in example.messages
        ]
    return values


def example_of(values: dict[str, Any]) -> Example:
    """The inverse of `example_values`."""
    fields = {name: values[name] for name, _ in _EXAMPLE}
    if fields["messages"] is not None:
        fields["messages"] = tuple(Message(**turn) for turn in fields["messages"])
    return Example(**fields)


# --- blocks to shards ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shard:
    """One written shard: its name in the store, and the rows of each bucket in it, in order."""

    name: str
    buckets: tuple[int, ...]
    rows: tuple[int, ...]


def write_shard(block: pa.Table, root: str, folder: str) -> pa.Table:
    """Write a block grouped by bucket; one row that describes the Shard (for Ray Data)."""
    order = pc.sort_indices(block, sort_keys=[("bucket", "ascending")])
    block = block.take(order).combine_chunks()
    counts = Counter(block["bucket"].to_pylist())
    buckets = sorted(counts)
    sink, at = pa.BufferOutputStream(), 0
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(sink, _SHARD_SCHEMA, options=options) as writer:
        for bucket in buckets:
            for batch in block.slice(at, counts[bucket]).combine_chunks().to_batches():
                writer.write_batch(batch)
            at += counts[bucket]
    name = f"{folder}/{uuid.uuid4().hex}.arrow"
    Store(root).write(name, sink.getvalue().to_pybytes())
    return pa.table(
        {"name": [name], "buckets": [buckets], "rows": [[counts[bucket] for bucket in buckets]]}
    )


def read_shards(root: str, parts: Sequence[tuple[str, int]]) -> pa.Table:
    """The rows of one bucket: `parts` are names of shards and the batch to take of each."""
    store, batches = Store(root), []
    for name, position in parts:
        with open_binary(store.path(name)) as stream:
            batches.append(pa.ipc.open_file(stream).get_batch(position))
    return pa.Table.from_batches(batches, schema=_SHARD_SCHEMA)


# --- shards to buckets ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BucketJob:
    """One bucket to finish: where its rows lie and where they go."""

    root: str
    partition_id: str
    bucket: int
    parts: tuple[tuple[str, int], ...]
    config: DataConfig


@dataclass(frozen=True, slots=True)
class _Gathered:
    """A row of a bucket with its origin and how many tokens of it are supervised."""

    user_id: str
    example: Example
    source_file: str
    row: int
    supervised: int = 0


def survey(job: BucketJob, template: Template) -> tuple[dict[str, int], pa.Table]:
    """Train + valid rows of each user of a bucket, and the rows that cannot be encoded."""
    good, bad = _measure(_gather(job, None), template, job.config.max_length)
    counts = Counter(item.user_id for item in good if item.example.split != "test")
    return dict(counts), bad


def finish(
    job: BucketJob, template: Template, keep: frozenset[str] | None
) -> tuple[pa.Table, pa.Table]:
    """Write one bucket's file; its users' index rows, and the rows that cannot be encoded.

    `keep` names the users to keep (None: all). Nothing is written for an empty bucket.
    """
    good, bad = _measure(_gather(job, keep), template, job.config.max_length)
    good.sort(key=lambda item: item.user_id)
    columns: dict[str, list[object]] = {name: [] for name in BUCKET_SCHEMA.names}
    index: list[dict[str, object]] = []
    for user_id, items in groupby(good, key=lambda item: item.user_id):
        examples, entry = _finish_user(list(items), job)
        index.append(entry)
        for example in examples:
            values = {"user_id": user_id, "user_key": entry["user_key"], **example_values(example)}
            for name, column in columns.items():
                column.append(values[name])
    if index:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=BUCKET_SCHEMA), sink, compression="zstd")
        folder = bucket_folder(job.partition_id, job.bucket)
        Store(job.root).write(f"{folder}/part-0.parquet", sink.getvalue().to_pybytes())
    return pa.Table.from_pylist(index, schema=INDEX_SCHEMA), bad


def _gather(job: BucketJob, keep: frozenset[str] | None) -> list[_Gathered]:
    table = read_shards(job.root, job.parts)
    if keep is not None:
        table = table.filter(pc.is_in(table["user_id"], pa.array(sorted(keep), pa.string())))
    return [
        _Gathered(values["user_id"], example_of(values), values["source_file"], values["row"])
        for values in table.to_pylist()
    ]


def _measure(
    items: list[_Gathered], template: Template, max_length: int
) -> tuple[list[_Gathered], pa.Table]:
    fit = Fit(template, max_length)
    supervised = fit.supervised([item.example for item in items])
    good, bad = [], []
    for item, tokens in zip(items, supervised, strict=True):
        reason = fit.reason(item.example, tokens)
        if reason is None:
            good.append(replace(item, supervised=tokens))
        else:
            bad.append({"source_file": item.source_file, "row": item.row, "reason": _clean(reason)})
    return good, pa.Table.from_pylist(bad, schema=QUARANTINE_SCHEMA)


def _finish_user(items: list[_Gathered], job: BucketJob) -> tuple[list[Example], dict[str, object]]:
    rows = [item.example for item in items]
    splits = assign_splits(rows)
    rows = [replace(row, split=split) for row, split in zip(rows, splits, strict=True)]
    kept = select_rows(rows, job.config.max_rows)
    examples = [rows[position] for position in kept]
    times = [example.timestamp for example in examples if example.timestamp is not None]
    count = Counter(example.split for example in examples)
    return examples, {
        "user_id": items[0].user_id,
        "user_key": user_key(items[0].user_id),
        "bucket": job.bucket,
        "rows": len(examples),
        "supervised_tokens": sum(items[position].supervised for position in kept),
        "data_digest": data_digest(examples),
        "first_at": min(times, default=None),
        "last_at": max(times, default=None),
        "rows_train": count["train"],
        "rows_valid": count["valid"],
        "rows_test": count["test"],
        "too_few": too_few(rows, job.config.min_examples),
    }


def auto_buckets(files: Sequence[InputFile]) -> int:
    """How many buckets suit these files: one for each 32 MiB of text, at least 8."""
    text = sum(
        file.size * next((by for end, by in _EXPANSION.items() if file.name.endswith(end)), 1)
        for file in files
    )
    return min(max(8, -(-text // _BUCKET_BYTES)), 99_999)


def largest(
    counts: list[dict[str, int]], jobs: list[BucketJob], max_users: int
) -> dict[int, frozenset[str]]:
    """The users with the most rows, ties by id, as the users to keep of each bucket."""
    users = [
        (-rows, user_id, job.bucket)
        for job, table in zip(jobs, counts, strict=True)
        for user_id, rows in table.items()
    ]
    chosen: dict[int, set[str]] = {job.bucket: set() for job in jobs}
    for _, user_id, bucket in sorted(users)[:max_users]:
        chosen[bucket].add(user_id)
    return {bucket: frozenset(ids) for bucket, ids in chosen.items()}
