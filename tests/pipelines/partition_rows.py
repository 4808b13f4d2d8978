"""Rows and files for the partitioning tests, and the expected results."""

from __future__ import annotations

import base64
import hmac
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from ray import cloudpickle

from pipelines.rows.buckets import BAD, NOTE, examples_of, read_blocks
from pipelines.rows.inputs import find_files, inspect
from pipelines.rows.stored import Partition, read_index, read_users
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
SMALL = DataConfig(buckets=5)
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
    sources: Iterable[Path | str], names: ColumnNames | None = None, piece_bytes: int = 1 << 20
) -> tuple[dict[str, list[Example]], list[tuple[str, int, str]], dict[tuple[str, str], int]]:
    """Read sources without Ray: users' examples, bad rows, notes."""
    files = find_files([str(source) for source in sources]).files
    pieces = [piece for file in files for piece in inspect(file, piece_bytes).pieces]
    users: dict[str, list[Example]] = defaultdict(list)
    bad, notes = [], Counter[tuple[str, str]]()
    for block in read_blocks(pieces, 5, 1 << 20, names or ColumnNames()):
        for row, example in zip(block.to_pylist(), examples_of(block), strict=True):
            if row["bucket"] == BAD:
                bad.append((os.path.basename(row["source_file"]), row["row"], row["reason"]))
            elif row["bucket"] == NOTE:
                notes[row["reason"], row["user_id"]] += row["row"]
            else:
                users[row["user_id"]].append(example)
    return dict(users), bad, dict(notes)


def read_all(store: Store, made: Partition) -> dict[str, list[Example]]:
    """All users of all bucket files. Fails if a user is in two of them."""
    users: dict[str, list[Example]] = {}
    for name in store.list(f"partitions/{made.partition_id}"):
        if name.startswith("user_bucket="):
            bucket = read_users(store, made.partition_id, int(name.split("=")[1]))
            assert not set(bucket) & set(users)
            users |= bucket
    ids = {entry["user_key"]: entry["user_id"] for entry in read_index_rows(store, made)}
    return {ids[key]: examples for key, examples in users.items()}


def read_quarantine(store: Store, partition_id: str) -> list[tuple[str, int, str]]:
    table = pq.read_table(store.path("partitions", partition_id, "quarantine.parquet"))
    return [
        (os.path.basename(row["source_file"]), row["row"], row["reason"])
        for row in table.to_pylist()
    ]


def read_index_rows(store: Store, made: Partition) -> list[Raw]:
    return read_index(store, made.partition_id).to_pylist()
