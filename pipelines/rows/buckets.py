"""The partitioning tasks: raw pieces of files to shards, and shards to finished buckets.

A shard has one block of checked rows as Arrow record batches, one per bucket, so that a bucket can
later read just its part of every shard. The shards that tasks return are used, not those found in
the folder, so a task that died and was repeated counts once. All rows of a bucket are then gathered
in one task, where users are assembled, so no block boundary can split a user. The trade-off: a
bucket must fit into a task's memory.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.rows.notices import MOST_SUBJECTS
from pipelines.rows.readers import Piece, read_piece
from pipelines.rows.streams import InputFile, open_binary, reading
from ptuning.data.columns import ColumnNames, Columns
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
from ptuning.data.values import Notes
from ptuning.errors import DataError
from ptuning.store import Store
from ptuning.types import Example, Message, Split

BAD, NOTE = -1, -2  # in a block, the "buckets" of quarantined rows and of counts for notices
_BUCKET_BYTES = 32 << 20
_EXPANSION = 4  # text bytes per byte of a compressed file, roughly

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_EXAMPLE = [
    ("timestamp", pa.int64()),
    ("prompt", pa.string()),
    ("completion", pa.string()),
    ("messages", _MESSAGES),
    ("split", pa.string()),
    ("init_words", pa.string()),
]
_EXAMPLE_NAMES = [name for name, _ in _EXAMPLE]
BUCKET_SCHEMA = pa.schema([("user_id", pa.string()), ("user_key", pa.string()), *_EXAMPLE])
QUARANTINE_SCHEMA = pa.schema(
    [
        ("source_file", pa.string()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("user_id", pa.string()),
    ]
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
# In a row of bucket NOTE, `reason` is the kind of the notice, `user_id` its subject and `row` the
# count. Such rows pass through Ray Data like all others, however it splits blocks.
_SHARD_SCHEMA = pa.schema([("bucket", pa.int32()), *QUARANTINE_SCHEMA, *_EXAMPLE])


class UserKeys(Protocol):
    """The part of the store's identity that partitions need."""

    def user_key(self, user_id: str) -> str: ...


def bucket_of(user_id: str, buckets: int) -> int:
    """A user's bucket: the SHA-256 of the id as a number, modulo the number of buckets."""
    return int.from_bytes(hashlib.sha256(user_id.encode("utf-8")).digest(), "big") % buckets


def bucket_folder(partition_id: str, bucket: int) -> str:
    """A bucket's folder, relative to the store's root."""
    return f"partitions/{partition_id}/user_bucket={bucket:05d}"


# --- pieces to blocks ----------------------------------------------------------------------


def read_blocks(
    pieces: Sequence[Piece], buckets: int, block_bytes: int, names: ColumnNames
) -> Iterator[pa.Table]:
    """Read and check the rows of pieces, in blocks of about `block_bytes` of text that include bad
    rows.

    A file that cannot be read to its end gives a bad row with number 0.
    """
    block = _Block(buckets, names)
    for piece in pieces:
        block.begin(piece)
        try:
            with reading(piece.file):
                for number, raw in read_piece(piece, block.columns, block.notes):
                    block.add(number, raw)
                    if block.size >= block_bytes:
                        yield block.take()
        except DataError as error:
            block.add_bad(0, str(error))
        block.end()
    if block.rows:
        yield block.take()


class _Block:
    """Collects the rows of a shard's table."""

    def __init__(self, buckets: int, names: ColumnNames) -> None:
        self.columns, self.notes = Columns(names), Notes()
        self.rows: list[tuple[object, ...]] = []  # as in _SHARD_SCHEMA
        self.size = 0  # bytes of text, roughly
        self._buckets = buckets
        self._bucket_of = lru_cache(maxsize=1 << 16)(bucket_of)  # a user has many rows
        self._file = ""
        self._folder: dict[str, object] = {}

    def begin(self, piece: Piece) -> None:
        self._file = _clean(piece.file.url)
        folders = dict(piece.file.folders)
        layout = self.columns.layout(tuple(folders))
        layout.uses += bool(folders)
        self._folder = {field: folders[name] for field, name in layout.sources.items()}

    def end(self) -> None:
        """Convert the notes of the piece just read to rows."""
        for name, count in self.columns.unknown().most_common(MOST_SUBJECTS):
            self.notes["unknown_column", name] = count
        for (kind, subject), count in self.notes.items():
            self._append(NOTE, count, kind, _clean(subject))
        self.notes.clear()

    def add(self, number: int, raw: dict[str, object] | str) -> None:
        if isinstance(raw, str):
            self.add_bad(number, raw)
            return
        try:
            row = check_row(raw, self.columns, self._folder, self.notes)
        except DataError as error:
            self.add_bad(number, error.message, error.fields.get("user_id"))
            return
        if not row.learned:
            self.notes["weight_zero", ""] += 1
            return
        example = row.example
        self.size += 64 + sum(map(len, texts_of(example)))
        self.rows.append(
            (
                self._bucket_of(row.user_id, self._buckets),
                self._file,
                number,
                None,
                row.user_id,
                example.timestamp,
                example.prompt,
                example.completion,
                None if example.messages is None else [vars(turn) for turn in example.messages],
                example.split,
                example.init_words,
            )
        )

    def add_bad(self, number: int, reason: str, user_id: str | None = None) -> None:
        self._append(BAD, number, _clean(reason), user_id)

    def _append(self, bucket: int, number: int, reason: str, user_id: str | None) -> None:
        self.size += 64
        empty = (None,) * len(_EXAMPLE)
        self.rows.append((bucket, self._file, number, reason, user_id, *empty))

    def take(self) -> pa.Table:
        """Return the rows as a table and empty the block."""
        columns = [
            pa.array(values, field.type)
            for values, field in zip(zip(*self.rows, strict=True), _SHARD_SCHEMA, strict=True)
        ]
        self.rows, self.size = [], 0
        return pa.table(columns, schema=_SHARD_SCHEMA)


def _clean(text: str) -> str:
    """Text that can be written as UTF-8, even if the name of a file or column cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def examples_of(table: pa.Table) -> list[Example]:
    """The examples of a shard's or a bucket's rows."""
    columns = [table[name].to_pylist() for name in _EXAMPLE_NAMES]
    return [
        Example(
            timestamp=timestamp,
            prompt=prompt,
            completion=completion,
            messages=None if turns is None else tuple(Message(**turn) for turn in turns),
            split=split,
            init_words=init_words,
        )
        for timestamp, prompt, completion, turns, split, init_words in zip(*columns, strict=True)
    ]


# --- blocks to shards ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shard:
    """A written shard: its files in the store and their contents.

    The file `name` has the rows of each bucket, in order, and `bad_name` the quarantined rows; ""
    if there are none. `files` are the inputs with at least one good row. `notes` are (kind,
    subject, rows).
    """

    name: str
    buckets: tuple[int, ...]
    rows: tuple[int, ...]
    bad_name: str
    bad_rows: int
    files: tuple[str, ...]
    notes: tuple[tuple[str, str, int], ...]

    @property
    def unlearned(self) -> int:
        """Rows of weight 0."""
        return sum(count for kind, _, count in self.notes if kind == "weight_zero")


def write_shard(block: pa.Table, root: str, folder: str) -> pa.Table:
    """Write a block, grouped by bucket; returns the Shard as a table of one row, for Ray Data."""
    store, name = Store(root), f"{folder}/{uuid.uuid4().hex}"
    notes = block.filter(pc.equal(block["bucket"], NOTE))
    bad = block.filter(pc.equal(block["bucket"], BAD)).select(QUARANTINE_SCHEMA.names)
    good = block.filter(pc.greater_equal(block["bucket"], 0))
    good = good.take(pc.sort_indices(good, sort_keys=[("bucket", "ascending")])).combine_chunks()
    unlearned = notes.filter(pc.equal(notes["reason"], "weight_zero"))
    files = {*pc.unique(good["source_file"]).to_pylist(), *unlearned["source_file"].to_pylist()}
    counts = Counter(good["bucket"].to_pylist())
    if counts:
        batches, at = [], 0
        for rows in counts.values():
            batches += good.slice(at, rows).combine_chunks().to_batches()
            at += rows
        store.write(f"{name}.arrow", _ipc_bytes(_SHARD_SCHEMA, batches))
    if bad.num_rows:
        store.write(f"{name}.bad.arrow", _ipc_bytes(QUARANTINE_SCHEMA, bad.to_batches()))
    shard = Shard(
        name=f"{name}.arrow" if counts else "",
        buckets=tuple(counts),
        rows=tuple(counts.values()),
        bad_name=f"{name}.bad.arrow" if bad.num_rows else "",
        bad_rows=bad.num_rows,
        files=tuple(sorted(files)),
        notes=tuple(
            zip(*(notes[name].to_pylist() for name in ("reason", "user_id", "row")), strict=True)
        ),
    )
    return pa.table({"shard": [json.dumps(asdict(shard))]})


def _ipc_bytes(schema: pa.Schema, batches: Sequence[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def shard_of(row: Mapping[str, Any]) -> Shard:
    """The shard that a row of `write_shard` describes."""
    values = json.loads(row["shard"])
    lists = {name: tuple(values[name]) for name in ("buckets", "rows", "files")}
    return Shard(**values | lists | {"notes": tuple(map(tuple, values["notes"]))})


def read_bad(root: str, shards: Sequence[Shard]) -> pa.Table:
    """Read only the quarantined rows of shards (QUARANTINE_SCHEMA)."""
    store = Store(root)
    tables = [QUARANTINE_SCHEMA.empty_table()]
    for shard in shards:
        if shard.bad_name:
            with open_binary(store.path(shard.bad_name)) as stream:
                tables.append(pa.ipc.open_file(stream).read_all())
    return pa.concat_tables(tables)


def read_shards(root: str, parts: Sequence[tuple[str, int]]) -> pa.Table:
    """Read the rows of one bucket; `parts` are the names of shards and the batch in each."""
    store, batches = Store(root), []
    for name, position in parts:
        with open_binary(store.path(name)) as stream:
            batches.append(pa.ipc.open_file(stream).get_batch(position))
    return pa.Table.from_batches(batches, schema=_SHARD_SCHEMA)


# --- shards to buckets ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BucketJob:
    """One bucket to finish: where to read its rows, where to write them, and how to make keys."""

    root: str
    partition_id: str
    bucket: int
    parts: tuple[tuple[str, int], ...]
    config: DataConfig
    keys: UserKeys


@dataclass(frozen=True, slots=True)
class _Rows:
    """A bucket's rows that can be encoded: as a table, as examples, with supervised tokens."""

    table: pa.Table
    user_ids: list[str]
    examples: list[Example]
    supervised: list[int]


def survey(job: BucketJob, template: Template) -> tuple[dict[str, int], pa.Table]:
    """Count the train + valid rows of each user of a bucket; also returns the rows that cannot be
    encoded."""
    rows, bad = _measure(read_shards(job.root, job.parts), template, job.config.max_length)
    counts = dict.fromkeys(rows.user_ids, 0)
    for user_id, example in zip(rows.user_ids, rows.examples, strict=True):
        counts[user_id] += example.split != "test"
    return counts, bad


def finish(
    job: BucketJob, template: Template, keep: frozenset[str] | None
) -> tuple[pa.Table, pa.Table]:
    """Write one bucket's file; returns its users' index rows and the rows that cannot be encoded.

    `keep` are the users to keep (None: all). Nothing is written for an empty bucket.
    """
    table = read_shards(job.root, job.parts)
    if keep is not None:
        table = table.filter(pc.is_in(table["user_id"], pa.array(sorted(keep), pa.string())))
    rows, bad = _measure(table, template, job.config.max_length)
    order = sorted(range(len(rows.user_ids)), key=rows.user_ids.__getitem__)
    kept: list[int] = []
    splits: list[str] = []
    keys: list[str] = []
    index: list[dict[str, object]] = []
    for _, group in groupby(order, key=rows.user_ids.__getitem__):
        positions, user_splits, entry = _finish_user(list(group), rows, job)
        kept += positions
        splits += user_splits
        keys += [str(entry["user_key"])] * len(positions)
        index.append(entry)
    if index:
        table = (
            rows.table.select(["user_id", *_EXAMPLE_NAMES])
            .combine_chunks()
            .take(pa.array(kept, pa.int64()))
        )
        table = table.drop_columns("split").append_column("split", pa.array(splits, pa.string()))
        table = table.append_column("user_key", pa.array(keys, pa.string()))
        _write_bucket(job, table.select(BUCKET_SCHEMA.names))
    return pa.Table.from_pylist(index, schema=INDEX_SCHEMA), bad


def _write_bucket(job: BucketJob, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    folder = bucket_folder(job.partition_id, job.bucket)
    Store(job.root).write(f"{folder}/part-0.parquet", sink.getvalue().to_pybytes())


def _measure(table: pa.Table, template: Template, max_length: int) -> tuple[_Rows, pa.Table]:
    """Split rows into those that can be encoded and the others, with reasons
    (QUARANTINE_SCHEMA)."""
    examples, user_ids = examples_of(table), table["user_id"].to_pylist()
    fit = Fit(template, max_length)
    supervised = fit.supervised(examples)
    reasons = [
        None if (reason := fit.reason(example, tokens)) is None else _clean(reason)
        for example, tokens in zip(examples, supervised, strict=True)
    ]
    if not any(reasons):
        return _Rows(table, user_ids, examples, supervised), QUARANTINE_SCHEMA.empty_table()
    good = [position for position, reason in enumerate(reasons) if reason is None]
    at = table.schema.get_field_index("reason")
    marked = table.set_column(at, "reason", pa.array(reasons, pa.string()))
    bad = marked.filter(pc.is_valid(marked["reason"])).select(QUARANTINE_SCHEMA.names)
    rows = _Rows(
        table.take(pa.array(good, pa.int64())),
        [user_ids[position] for position in good],
        [examples[position] for position in good],
        [supervised[position] for position in good],
    )
    return rows, bad


def _finish_user(
    positions: list[int], rows: _Rows, job: BucketJob
) -> tuple[list[int], list[Split], dict[str, object]]:
    """For one user, the positions of the rows to keep, oldest first, their splits, and the index
    row."""
    examples = [rows.examples[position] for position in positions]
    splits = assign_splits(examples)
    examples = [
        example if example.split == split else replace(example, split=split)
        for example, split in zip(examples, splits, strict=True)
    ]
    chosen = select_rows(examples, job.config.max_rows)
    kept = [examples[at] for at in chosen]
    times = [example.timestamp for example in kept if example.timestamp is not None]
    count = Counter(splits[at] for at in chosen)
    user_id = rows.user_ids[positions[0]]
    entry: dict[str, object] = {
        "user_id": user_id,
        "user_key": job.keys.user_key(user_id),
        "bucket": job.bucket,
        "rows": len(kept),
        "supervised_tokens": sum(rows.supervised[positions[at]] for at in chosen),
        "data_digest": data_digest(kept),
        "first_at": min(times, default=None),
        "last_at": max(times, default=None),
        "rows_train": count["train"],
        "rows_valid": count["valid"],
        "rows_test": count["test"],
        "too_few": too_few(examples, job.config.min_examples),
    }
    return [positions[at] for at in chosen], [splits[at] for at in chosen], entry


def auto_buckets(files: Sequence[InputFile]) -> int:
    """The number of buckets for these files: one per 32 MiB of text, at least 8."""
    compressed = [bool(file.compression) or file.kind == "parquet" for file in files]
    text = sum(
        file.size * (_EXPANSION if is_compressed else 1)
        for file, is_compressed in zip(files, compressed, strict=True)
    )
    return min(max(8, -(-text // _BUCKET_BYTES)), 99_999)


def largest(
    counts: list[dict[str, int]], jobs: list[BucketJob], max_users: int
) -> dict[int, frozenset[str]]:
    """The users to keep in each bucket: those with the most rows, ties by id."""
    users = [
        (-rows, user_id, job.bucket)
        for job, table in zip(jobs, counts, strict=True)
        for user_id, rows in table.items()
    ]
    chosen: dict[int, set[str]] = {job.bucket: set() for job in jobs}
    for _, user_id, bucket in sorted(users)[:max_users]:
        chosen[bucket].add(user_id)
    return {bucket: frozenset(ids) for bucket, ids in chosen.items()}
