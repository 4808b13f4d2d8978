"""Which chunks make a partition, and what a delivery makes of the files before it.

partitions/<id>/chunks.parquet        one row per chunk (and per empty file), with its counts
partitions/latest/<rules>.json        names the newest partition under these rules
partitions/delivered/<name>.json      names the newest list of delivered files, for a prefix name
partitions/deliveries/<id>.parquet    such a list: all files that were delivered, copies included
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import pyarrow as pa

from pipelines.rows.inputs import Inspected
from pipelines.rows.shards import Shards, open_parquet, write_parquet
from pipelines.rows.streams import Chunk, InputFile
from ptuning.errors import RunError
from ptuning.store import Store

Delivery = Literal["append", "snapshot"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One chunk of a partition: its file, its rows, and how many of them do not fit. A file without
    contents has one entry without a chunk."""

    file: InputFile
    chunk: Chunk | None
    shards: Shards
    unfit: int = 0

    @property
    def bad(self) -> int:
        return self.shards.bad + self.unfit


_OWN_FORM = ("url", "folders")
_FILE = [field.name for field in fields(InputFile) if field.name not in _OWN_FORM]
_FILE_TYPES = {"size": pa.int64(), "is_fresh": pa.bool_()}
_CHUNK = [field.name for field in fields(Chunk)]
_SHARDS = ["name", "shards", "rows", "bad", "unlearned"]
_SCHEMA = pa.schema(
    [
        ("file_url", pa.binary()),  # names of files need not be UTF-8
        *((f"file_{name}", _FILE_TYPES.get(name, pa.string())) for name in _FILE),
        ("file_folders", pa.string()),
        *((f"chunk_{name}", pa.string() if name == "digest" else pa.int64()) for name in _CHUNK),
        *((name, pa.string() if name == "name" else pa.int64()) for name in _SHARDS),
        ("notes", pa.string()),
        ("unfit", pa.int64()),
    ]
)


def write_entries(store: Store, name: str, entries: Iterable[Entry]) -> None:
    rows = [_to_row(entry) for entry in entries]
    write_parquet(store, name, pa.Table.from_pylist(rows, schema=_SCHEMA))


def read_entries(store: Store, name: str) -> list[Entry]:
    """Raises RunError if the file is gone: somebody removed it from the store."""
    try:
        table = open_parquet(store, name).read()
    except FileNotFoundError as error:
        raise RunError(
            "a file of the store is gone",
            seen=store.path(name),
            fix="restore it; or remove the file in partitions/delivered/ or partitions/latest/ "
            "that names it, and deliver all files again",
        ) from error
    return [_from_row(row) for row in table.to_pylist()]


def chunks_name(partition_id: str) -> str:
    return f"partitions/{partition_id}/chunks.parquet"


def _to_row(entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {f"file_{name}": getattr(entry.file, name) for name in _FILE}
    row["file_url"] = entry.file.url.encode("utf-8", "surrogateescape")
    row["file_folders"] = json.dumps(entry.file.folders)
    if entry.chunk is not None:
        row |= {f"chunk_{name}": value for name, value in asdict(entry.chunk).items()}
    row |= {name: getattr(entry.shards, name) for name in _SHARDS}
    return {**row, "notes": json.dumps(entry.shards.notes), "unfit": entry.unfit}


def _from_row(row: dict[str, Any]) -> Entry:
    folders = tuple((name, value) for name, value in json.loads(row["file_folders"]))
    notes = tuple((kind, subject, count) for kind, subject, count in json.loads(row["notes"]))
    chunk = None
    if row["chunk_digest"] is not None:
        chunk = Chunk(**{name: row[f"chunk_{name}"] for name in _CHUNK})
    url = row["file_url"].decode("utf-8", "surrogateescape")
    file = {name: row[f"file_{name}"] for name in _FILE}
    return Entry(
        file=InputFile(url=url, folders=folders, **file),
        chunk=chunk,
        shards=Shards(**{name: row[name] for name in _SHARDS}, notes=notes),
        unfit=row["unfit"],
    )


def files_of(entries: Iterable[Entry]) -> dict[str, Inspected]:
    """The files of a partition, by URL."""
    files: dict[str, Inspected] = {}
    for entry in entries:
        before = files.get(entry.file.url, Inspected(entry.file, ()))
        if entry.chunk is not None:
            before = replace(before, chunks=(*before.chunks, entry.chunk))
        files[entry.file.url] = before
    return files


@dataclass(frozen=True, slots=True)
class Delivered:
    """All that was delivered for a prefix name: the files, and the newest partition of them. `etag`
    is that of the pointer, None before the first delivery."""

    files: dict[str, Inspected]
    partition_id: str = ""
    etag: str | None = None


def read_delivered(store: Store, series: str) -> Delivered:
    found = store.read_versioned(_pointer(series))
    if found is None:
        return Delivered({})
    values = json.loads(found[0])
    entries = read_entries(store, _list_name(values["files"]))
    return Delivered(files_of(entries), values["partition_id"], found[1])


def record_delivery(
    store: Store, series: str, part_id: str, files: Sequence[Inspected], delivery: Delivery
) -> None:
    """Record that these files were delivered, and what partition came of them.

    If another run has delivered meanwhile, its files stay, under `append`; they are in the
    partition of the next run.
    """
    for _ in range(_RACES):
        before = read_delivered(store, series)
        now = add_delivery(before.files, files, delivery)
        if before.partition_id == part_id and before.files == {item.file.url: item for item in now}:
            return
        entries = [
            Entry(item.file, chunk, Shards(""))
            for item in now
            for chunk in (item.chunks or (None,))
        ]
        name = uuid.uuid4().hex
        write_entries(store, _list_name(name), entries)
        data = json.dumps({"files": name, "partition_id": part_id}).encode("ascii")
        if before.etag is None:
            done = store.put_if_absent(_pointer(series), data)
        else:
            done = store.replace_if_unchanged(_pointer(series), data, before.etag)
        if done:
            return
        store.remove(_list_name(name))
    raise RunError("other runs deliver to this store all the time", seen=store.root)


_RACES = 20


def _pointer(series: str) -> str:
    return f"partitions/delivered/{series}.json"


def _list_name(name: str) -> str:
    return f"partitions/deliveries/{name}.parquet"


def add_delivery(
    known: dict[str, Inspected], delivered: Sequence[Inspected], delivery: Delivery
) -> list[Inspected]:
    """The files of the new partition, by URL.

    `append`: a delivered file replaces the known one with its URL, and all others stay. `snapshot`:
    the delivered files alone.
    """
    files = {item.file.url: item for item in delivered}
    if delivery == "append":
        files = known | files
    return [files[url] for url in sorted(files)]


def drop_copies(
    files: Sequence[tuple[Inspected, tuple[str, ...]]],
) -> tuple[list[tuple[Inspected, tuple[str, ...]]], list[str]]:
    """The files, each with the names of its chunks, without those that have the same chunks as an
    earlier one; and the URLs of these. Such a file was delivered twice, under two names."""
    seen: set[tuple[str, ...]] = set()
    kept, copies = [], []
    for item, names in files:
        if names and names in seen:
            copies.append(item.file.url)
        else:
            seen.add(names)
            kept.append((item, names))
    return kept, copies
