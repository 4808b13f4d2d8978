"""Read one chunk of an input file into shards: its rows checked, keyed and sorted by user.

A chunk's folder in the store is named after its contents and the rules for reading them, so each
chunk is read once, by whichever run meets it first:

inputs/<chunk_digest>-<row_config_digest>/
    shard-<n>.parquet     good rows, sorted by user key (SHARD_SCHEMA), in row groups of 2,048
    bad.parquet           quarantined rows (BAD_SCHEMA), if there are any
    shards.json           written last: what is in the others
    fit-<rules>-<n>.parquet, unfit-<rules>.parquet, fit-<rules>.json    see `fits.py`

Writing is idempotent: two processes that read one chunk write the same rows.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.rows.choose import CODES
from pipelines.rows.inputs import check_unchanged
from pipelines.rows.notices import MOST_SUBJECTS
from pipelines.rows.readers import read_chunk
from pipelines.rows.streams import Chunk, InputFile, open_binary, reading
from ptuning.data.columns import ROW_RULES, ColumnNames, Columns, Layout
from ptuning.data.examples import (
    ROW_DIGEST_BYTES,
    Row,
    check_row,
    digest_fields,
    row_digest,
    texts_of,
)
from ptuning.data.times import read_time
from ptuning.data.values import Notes
from ptuning.errors import DataError
from ptuning.store import Store
from ptuning.types import Example, Message

SHARD_BYTES = 16 << 20  # text per shard
GROUP_ROWS = 2048  # rows per row group: what is read for one user
FORMAT = [1, SHARD_BYTES, GROUP_ROWS]  # of a chunk's files; part of their names
_FIRST, _LAST = 10**11, 10**14  # numbers between these are epoch milliseconds, as they are
_MOST_LAYOUTS = 256  # every JSONL row may have different keys

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_TEXTS = [
    ("prompt", pa.string()),
    ("completion", pa.string()),
    ("messages", _MESSAGES),
    ("init_words", pa.string()),
]
TEXT_COLUMNS = tuple(name for name, _ in _TEXTS)
SHARD_SCHEMA = pa.schema(
    [
        ("user_key", pa.string()),
        ("user_id", pa.string()),
        ("number", pa.int64()),  # the row's number in its chunk, from 0
        ("timestamp", pa.int64()),
        ("split", pa.int8()),  # a code of choose.CODES
        ("digest", pa.binary(ROW_DIGEST_BYTES)),
        *_TEXTS,
    ]
)
BAD_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("reason", pa.string()),
        ("user_id", pa.string()),
        ("user_key", pa.string()),
    ]
)


class UserKeys(Protocol):
    """The part of the store's identity that partitions need."""

    def user_key(self, user_id: str) -> str: ...


@dataclass(frozen=True, slots=True)
class Shards:
    """What is in a chunk's folder `name`: the number of shards and of rows, good, quarantined and
    of weight 0. `notes` are (kind, subject, rows). `broken` says why the file could not be read to
    the end of the chunk; then nothing was written."""

    name: str
    shards: int = 0
    rows: int = 0
    bad: int = 0
    unlearned: int = 0
    notes: tuple[tuple[str, str, int], ...] = ()
    broken: str = ""

    @property
    def read(self) -> int:
        return self.rows + self.bad + self.unlearned


@dataclass(frozen=True, slots=True)
class ChunkJob:
    """A chunk to read into the folder `name`."""

    root: str
    name: str
    file: InputFile
    chunk: Chunk
    columns: ColumnNames
    keys: UserKeys
    shard_bytes: int = SHARD_BYTES


def chunk_name(chunk: Chunk, file: InputFile, columns: ColumnNames, keys: UserKeys) -> str:
    """The chunk's folder, relative to the store's root.

    It depends on the contents and on everything that decides what rows they are: the rules, the
    column names, the file's format, the columns in its folders' names, and the store's salt. It
    does not depend on where the file is.
    """
    stated = dict(file.folders)
    sources = Columns(columns).layout(tuple(stated)).sources
    folders = sorted([field, stated[name]] for field, name in sources.items())
    rules = [
        [*FORMAT, ROW_RULES],
        columns.model_dump(mode="json"),
        [file.kind, file.compression, file.encoding],
        folders,
        keys.user_key(""),  # differs between salts, but does not reveal the salt
    ]
    config = hashlib.sha256(json.dumps(rules, sort_keys=True).encode("ascii")).hexdigest()
    return f"inputs/{chunk.digest[:32]}-{config[:12]}"


def make_shards(job: ChunkJob) -> Shards:
    """Read a chunk into shards, unless that has been done."""
    store = Store(job.root)
    if (found := read_record(store, job.name)) is not None:
        return found
    with without_collection():
        return _make_shards(store, job)


@contextmanager
def without_collection() -> Iterator[None]:
    """Rows are many small objects without cycles; to look for cycles among them again and again
    takes a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _make_shards(store: Store, job: ChunkJob) -> Shards:
    rows = _Rows(job)
    shards = 0
    try:
        with reading(job.file):
            for number, raw in read_chunk(job.file, job.chunk, rows.columns, rows.notes):
                rows.add(number - job.chunk.first_row, raw)
                if rows.size >= job.shard_bytes:
                    _write(store, f"{job.name}/shard-{shards}.parquet", rows.take())
                    shards += 1
            check_unchanged(job.file)
    except DataError as error:
        return Shards(job.name, broken=str(error))
    if rows.good:
        _write(store, f"{job.name}/shard-{shards}.parquet", rows.take())
        shards += 1
    if rows.bad:
        _write(store, f"{job.name}/bad.parquet", rows.bad_table())
    made = rows.describe(shards)
    store.write_json(f"{job.name}/shards.json", _to_json(made))
    return made


def read_record(store: Store, name: str) -> Shards | None:
    """What is in a chunk's folder; None if it is not complete."""
    record = f"{name}/shards.json"
    if not store.exists(record):
        return None
    values = store.read_json(record)
    return Shards(**{**values, "name": name, "notes": tuple(map(tuple, values["notes"]))})


def _to_json(made: Shards) -> dict[str, Any]:
    return {
        "shards": made.shards,
        "rows": made.rows,
        "bad": made.bad,
        "unlearned": made.unlearned,
        "notes": [list(note) for note in made.notes],
    }


@dataclass(frozen=True, slots=True)
class _PlainLayout:
    """The columns of rows that have a user, a prompt and a completion, and at most a time and a
    split besides."""

    user_id: str
    prompt: str
    completion: str
    timestamp: str | None = None
    split: str | None = None

    @classmethod
    def of(cls, layout: Layout) -> _PlainLayout | None:
        fields = set(layout.sources)
        needed = {"user_id", "prompt", "completion"}
        if layout.input is not None or not needed <= fields <= needed | {"timestamp", "split"}:
            return None
        return cls(**layout.sources)


class _Rows:
    """Checks raw rows and collects the columns of the next shard."""

    def __init__(self, job: ChunkJob) -> None:
        self.columns, self.notes = Columns(job.columns), Notes()
        self.good: list[tuple[object, ...]] = []  # as in SHARD_SCHEMA
        self.bad: list[tuple[object, ...]] = []  # as in BAD_SCHEMA
        self.size = 0  # bytes of text, roughly
        self._name, self._identity = job.name, job.keys
        self._keys: dict[str, str] = {}
        self._count = 0
        folders = dict(job.file.folders)
        layout = self.columns.layout(tuple(folders))
        layout.uses += bool(folders)
        self._folder: dict[str, object] = {
            field: folders[name] for field, name in layout.sources.items()
        }
        self._plain: dict[Layout, _PlainLayout | None] = {}

    def add(self, number: int, raw: dict[str, object] | str) -> None:
        if isinstance(raw, str):
            self._add_bad(number, raw, None)
            return
        if self._add_plain(number, raw):
            return
        try:
            row = check_row(raw, self.columns, self._folder, self.notes)
        except DataError as error:
            self._add_bad(number, error.message, error.fields.get("user_id"))
            return
        if row.learned:
            self._add_good(number, row)
        else:
            self.notes["weight_zero", ""] += 1

    def _add_plain(self, number: int, raw: dict[str, Any]) -> bool:
        """Add a row whose fields are just what they should be, much faster than `check_row` would;
        returns False for any other row, which then goes there."""
        try:
            layout = self.columns.layout(tuple(raw))
        except DataError:
            return False
        if layout not in self._plain:
            if len(self._plain) >= _MOST_LAYOUTS:
                self._plain.clear()
            self._plain[layout] = None if self._folder else _PlainLayout.of(layout)
        names = self._plain[layout]
        if names is None:
            return False
        user_id, prompt, completion = raw[names.user_id], raw[names.prompt], raw[names.completion]
        if not (
            type(user_id) is type(prompt) is type(completion) is str and user_id and completion
        ):
            return False
        split = raw[names.split] if names.split is not None else None
        time = raw[names.timestamp] if names.timestamp is not None else None
        if not (split is None or (type(split) is str and split in CODES)):
            return False
        if not (time is None or type(time) is int):
            return False
        notes = Notes()  # counted once it is known that the row is good
        try:
            stamp = time if time is None or _FIRST <= time < _LAST else read_time(time, notes)
            digest = digest_fields(stamp, prompt, completion)
            key = self._key_of(user_id)
        except (DataError, UnicodeEncodeError):
            return False
        if notes:
            self.notes.update(notes)
        layout.uses += 1
        self.size += 64 + len(prompt) + len(completion)
        self.good.append(
            (key, user_id, number, stamp, CODES[split], digest, prompt, completion, None, None)
        )
        return True

    def _add_good(self, number: int, row: Row) -> None:
        example = row.example
        self.size += 64 + sum(map(len, texts_of(example)))
        self.good.append(
            (
                self._key_of(row.user_id),
                row.user_id,
                number,
                example.timestamp,
                CODES[example.split],
                row_digest(example),
                example.prompt,
                example.completion,
                None if example.messages is None else [vars(turn) for turn in example.messages],
                example.init_words,
            )
        )

    def _add_bad(self, number: int, reason: str, user_id: str | None) -> None:
        key = None if user_id is None else self._key_of(user_id)
        self.bad.append((number, clean(reason), user_id, key))

    def _key_of(self, user_id: str) -> str:
        key = self._keys.get(user_id)
        if key is None:
            if len(self._keys) >= 1 << 17:
                self._keys.clear()
            key = self._keys[user_id] = self._identity.user_key(user_id)
        return key

    def take(self) -> pa.Table:
        """The good rows, sorted by user; they are collected anew."""
        table = _table(self.good, SHARD_SCHEMA)
        self._count += len(self.good)
        self.good, self.size = [], 0
        order = pc.sort_indices(table, [("user_key", "ascending"), ("number", "ascending")])
        return table.take(order)

    def bad_table(self) -> pa.Table:
        return _table(self.bad, BAD_SCHEMA)

    def describe(self, shards: int) -> Shards:
        notes = self.notes
        for name, count in self.columns.unknown().most_common(MOST_SUBJECTS):
            notes["unknown_column", name] = count
        return Shards(
            name=self._name,
            shards=shards,
            rows=self._count,
            bad=len(self.bad),
            unlearned=notes["weight_zero", ""],
            notes=tuple((kind, clean(subject), count) for (kind, subject), count in notes.items()),
        )


def clean(text: str) -> str:
    """Text that can be written as UTF-8, even if the name of a file or column cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _table(rows: Sequence[tuple[object, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [() for _ in schema]
    return pa.table(
        [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)],
        schema=schema,
    )


def _write(store: Store, name: str, table: pa.Table) -> None:
    users = ["user_key", "user_id"]  # the columns with repeated values; texts have few
    write_parquet(
        store,
        name,
        table,
        row_group_size=GROUP_ROWS,
        use_dictionary=users,
        write_statistics=["user_key"],
    )


def write_parquet(store: Store, name: str, table: pa.Table, **options: Any) -> None:
    with store.open_write(name) as file:
        pq.write_table(table, file, compression="lz4", **options)


def open_parquet(store: Store, name: str) -> pq.ParquetFile:
    """A Parquet file of the store, of which only what is asked for is read."""
    path = store.path(name)
    return pq.ParquetFile(path if store.is_local else open_binary(path))


def examples_of(table: pa.Table) -> list[Example]:
    """The examples of rows with the columns of SHARD_SCHEMA, without their splits."""
    columns = [table[name].to_pylist() for name in ("timestamp", *TEXT_COLUMNS)]
    return [
        Example(
            timestamp=timestamp,
            prompt=prompt,
            completion=completion,
            messages=None if turns is None else tuple(Message(**turn) for turn in turns),
            init_words=init_words,
        )
        for timestamp, prompt, completion, turns, init_words in zip(*columns, strict=True)
    ]


def count_notes(shards: Sequence[Shards]) -> Counter[tuple[str, str]]:
    """The chunks' notes, added up."""
    counts: Counter[tuple[str, str]] = Counter()
    for made in shards:
        for kind, subject, count in made.notes:
            counts[kind, subject] += count
    return counts
