"""Rows and files for the partitioning tests, and the expected results."""

from __future__ import annotations

import base64
import hmac
import json
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray import cloudpickle

from pipelines.rows.choose import SPLIT_OF
from pipelines.rows.gather import read_users
from pipelines.rows.inputs import find_files, inspect
from pipelines.rows.partition import Sizes, gather_users
from pipelines.rows.shards import (
    SHARD_SCHEMA,
    ChunkJob,
    chunk_name,
    examples_of,
    make_shards,
    open_parquet,
)
from pipelines.rows.stored import Partition, read_index
from ptuning.data.columns import ColumnNames
from ptuning.data.examples import DataConfig, arrange
from ptuning.store import Store
from ptuning.types import Example


@dataclass(frozen=True)
class Keys:
    """The part of a store's identity that partitions need."""

    salt: bytes

    def user_key(self, user_id: str) -> str:
        digest = hmac.digest(self.salt, user_id.encode("utf-8"), "sha256")
        return base64.b32encode(digest).decode("ascii").rstrip("=").lower()


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import it
KEYS = Keys(b"salt")
CONFIG = DataConfig()
SMALL = Sizes(chunk_bytes=500, bucket_rows=20)
HOSTILE = [
    "../../x",
    "caf\u00e9",
    "cafe\u0301",
    "u" * 5000,
    "line\nbreak",
    "<script>alert(1)</script>",
    "user_bucket=00001",
    "a,b\"c'd\\",
    "\u202egnp.exe",
    " ",
    "nul\x00nul",
    "\U0001f600",
]
Raw = dict[str, Any]


def make_rows(users: Iterable[str], each: int = 10, start: int = 1_700_000_000_000) -> list[Raw]:
    """Interleaved rows of users, one second apart."""
    return [
        {
            "user_id": user,
            "prompt": f"question {number} of {user[:20]}",
            "completion": f"answer {number}",
            "timestamp": start + number * 60_000 + position * 1000,
        }
        for number in range(each)
        for position, user in enumerate(users)
    ]


def write_jsonl(path: Path, rows: Iterable[Raw]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def expected_users(rows: Iterable[Raw], max_rows: int | None = None) -> dict[str, list[Example]]:
    """The result that the pure code computes from the rows: the oracle."""
    users: dict[str, list[Example]] = defaultdict(list)
    for row in rows:
        users[row["user_id"]].append(
            Example(**{key: value for key, value in row.items() if key != "user_id"})
        )
    return {user: arrange(examples, max_rows) for user, examples in users.items()}


def read_files(
    sources: Iterable[Path | str], names: ColumnNames | None = None, chunk_bytes: int = 1 << 20
) -> tuple[dict[str, list[Example]], list[tuple[str, int, str]], dict[tuple[str, str], int]]:
    """What sources hold, without Ray: users' examples as read, bad rows, notes."""
    with tempfile.TemporaryDirectory() as folder:
        return _read_files(Store(folder), sources, names or ColumnNames(), chunk_bytes)


def _read_files(
    store: Store, sources: Iterable[Path | str], columns: ColumnNames, chunk_bytes: int
) -> tuple[dict[str, list[Example]], list[tuple[str, int, str]], dict[tuple[str, str], int]]:
    users: dict[str, list[Example]] = defaultdict(list)
    bad, notes = [], Counter[tuple[str, str]]()
    for file in find_files([str(source) for source in sources]).files:
        item = inspect(file, chunk_bytes)
        for chunk in item.chunks:
            name = chunk_name(chunk, item.file, columns, KEYS)
            made = make_shards(ChunkJob(store.root, name, item.file, chunk, columns, KEYS))
            if made.broken:
                bad.append((item.file.name, 0, made.broken))
                continue
            tables = [
                open_parquet(store, f"{name}/shard-{number}.parquet").read()
                for number in range(made.shards)
            ]
            table = pa.concat_tables([SHARD_SCHEMA.empty_table(), *tables])
            codes = table["split"].to_pylist()
            rows = zip(
                table["number"].to_pylist(),
                table["user_id"].to_pylist(),
                codes,
                examples_of(table),
                strict=True,
            )
            for _, user_id, code, example in sorted(rows, key=lambda row: row[0]):
                users[user_id].append(replace(example, split=SPLIT_OF.get(code)))
            if made.bad:
                for row in open_parquet(store, f"{name}/bad.parquet").read().to_pylist():
                    number = row["number"] + chunk.first_row
                    bad.append((item.file.name, number, row["reason"]))
            for kind, subject, count in made.notes:
                notes[kind, subject] += count
    return dict(users), bad, dict(notes)


def read_all(store: Store, made: Partition) -> dict[str, list[Example]]:
    """Every user's rows, by id, as a run gathers them."""
    index = sorted(read_index_rows(store, made), key=lambda entry: entry["user_key"])
    folder = f"gathered/{made.partition_id}"
    gather_users(store, made, [(entry["user_key"], entry["rows"]) for entry in index], folder)
    users = read_users(store, folder, [entry["user_key"] for entry in index])
    return {entry["user_id"]: users[entry["user_key"]] for entry in index}


def read_quarantine(store: Store, partition_id: str) -> list[tuple[str, int, str]]:
    table = pq.read_table(store.path("partitions", partition_id, "quarantine.parquet"))
    return [
        (os.path.basename(row["source_file"]), row["row"], row["reason"])
        for row in table.to_pylist()
    ]


def read_index_rows(store: Store, made: Partition) -> list[Raw]:
    """The index, by user id."""
    rows: list[Raw] = read_index(store, made.partition_id).to_pylist()
    return sorted(rows, key=lambda entry: entry["user_id"])
