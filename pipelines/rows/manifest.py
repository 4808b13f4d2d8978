"""Which chunks make a partition, and what a delivery makes of the chunks before it.

partitions/delivered/<name>.json  names the partition of all that was delivered for prefixes of a name
partitions/latest/<rules>.json    names the newest partition under these rules
partitions/<id>/chunks.parquet    one row per chunk (and per empty file), with its counts
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import pyarrow as pa

from pipelines.rows.inputs import Inspected
from pipelines.rows.shards import Shards, open_parquet, write_parquet
from pipelines.rows.streams import Chunk, InputFile
from ptuning.store import Store

Delivery = Literal["append", "snapshot"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One chunk of a partition: its file, its rows, and how many of them do not fit. A file without
    contents has one entry without a chunk."""

    file: InputFile
    file_digest: str
    chunk: Chunk | None
    shards: Shards
    unfit: int = 0

    @property
    def bad(self) -> int:
        return self.shards.bad + self.unfit


_FILE = [field.name for field in fields(InputFile) if field.name != "folders"]
_CHUNK = [field.name for field in fields(Chunk)]
_SHARDS = ["name", "shards", "rows", "bad", "unlearned"]
_SCHEMA = pa.schema(
    [
        *((f"file_{name}", pa.int64() if name == "size" else pa.string()) for name in _FILE),
        ("file_folders", pa.string()),
        ("file_digest", pa.string()),
        *((f"chunk_{name}", pa.string() if name == "digest" else pa.int64()) for name in _CHUNK),
        *((name, pa.string() if name == "name" else pa.int64()) for name in _SHARDS),
        ("notes", pa.string()),
        ("unfit", pa.int64()),
    ]
)


def write_entries(store: Store, folder: str, entries: Iterable[Entry]) -> None:
    rows = [_to_row(entry) for entry in entries]
    write_parquet(store, f"{folder}/chunks.parquet", pa.Table.from_pylist(rows, schema=_SCHEMA))


def read_entries(store: Store, folder: str) -> list[Entry]:
    table = open_parquet(store, f"{folder}/chunks.parquet").read()
    return [_from_row(row) for row in table.to_pylist()]


def _to_row(entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {f"file_{name}": getattr(entry.file, name) for name in _FILE}
    row["file_folders"] = json.dumps(entry.file.folders)
    row["file_digest"] = entry.file_digest
    if entry.chunk is not None:
        row |= {f"chunk_{name}": value for name, value in asdict(entry.chunk).items()}
    row |= {name: getattr(entry.shards, name) for name in _SHARDS}
    return {**row, "notes": json.dumps(entry.shards.notes), "unfit": entry.unfit}


def _from_row(row: dict[str, Any]) -> Entry:
    folders = tuple((name, value) for name, value in json.loads(row["file_folders"]))
    notes = tuple((kind, subject, count) for kind, subject, count in json.loads(row["notes"]))
    chunk = Chunk(**{name: row[f"chunk_{name}"] for name in _CHUNK}) if row["name"] else None
    return Entry(
        file=InputFile(**{name: row[f"file_{name}"] for name in _FILE}, folders=folders),
        file_digest=row["file_digest"],
        chunk=chunk,
        shards=Shards(**{name: row[name] for name in _SHARDS}, notes=notes),
        unfit=row["unfit"],
    )


def files_of(entries: Iterable[Entry]) -> dict[str, Inspected]:
    """The files of a partition, by URL."""
    files: dict[str, Inspected] = {}
    for entry in entries:
        before = files.get(entry.file.url, Inspected(entry.file, entry.file_digest, ()))
        if entry.chunk is not None:
            before = replace(before, chunks=(*before.chunks, entry.chunk))
        files[entry.file.url] = before
    return files


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
