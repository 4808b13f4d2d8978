"""A partition as the store holds it: its record, its index, and the rows of chosen users.

Workers read through here; nothing of it needs Ray.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rows.buckets import bucket_folder, examples_of
from pipelines.rows.notices import BadFile, Notice, bad_files_from, notices_from
from ptuning.errors import RunError
from ptuning.store import Store
from ptuning.types import Example


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The commit record of a finished partition. `seconds` is how long it took.

    `notices` say what was not read, was lost, or was interpreted in a way worth knowing.
    `bad_files` are the files with the most quarantined rows, with their main reasons. Rows of
    weight 0 count as read, but are neither kept nor quarantined.
    """

    partition_id: str
    rows_read: int
    rows_kept: int
    rows_quarantined: int
    users: int
    too_few: int
    seconds: float
    notices: tuple[Notice, ...] = ()
    bad_files: tuple[BadFile, ...] = ()


def read_partition(store: Store, partition_id: str) -> Partition | None:
    """The commit record, or None if the partition is not finished."""
    name = f"partitions/{partition_id}/partition.json"
    if not store.exists(name):
        return None
    record = store.read_json(name)
    values = {field.name: record[field.name] for field in dataclasses.fields(Partition)}
    values["notices"] = notices_from(values["notices"])
    values["bad_files"] = bad_files_from(values["bad_files"])
    return Partition(**values)


def read_index(store: Store, partition_id: str) -> pa.Table:
    """The index: one row per user, sorted by id (INDEX_SCHEMA). Raises RunError if the partition is
    not finished.

    `rows`, `supervised_tokens`, `first_at`, `last_at` (epoch ms) and `data_digest` are of the kept
    rows of all splits; `too_few` is decided before `max_rows` is applied.
    """
    if read_partition(store, partition_id) is None:
        raise RunError(
            "the partition is not finished", seen=partition_id, fix="partition the data again"
        )
    return read_table(store, f"partitions/{partition_id}/index.parquet")


def read_users(
    store: Store, partition_id: str, bucket: int, user_keys: Sequence[str] | None = None
) -> dict[str, list[Example]]:
    """Rows of a bucket's users by user key, oldest first, with splits.

    `user_keys` are the users to read (None: all). Raises RunError if one is not in the bucket.
    """
    name = f"{bucket_folder(partition_id, bucket)}/part-0.parquet"
    users: dict[str, list[Example]] = {}
    if store.exists(name):
        wanted = None if user_keys is None else [("user_key", "in", sorted(set(user_keys)))]
        table = read_table(store, name, wanted)
        for key, example in zip(table["user_key"].to_pylist(), examples_of(table), strict=True):
            users.setdefault(key, []).append(example)
    missing = sorted(set(user_keys or ()) - users.keys())
    if missing:
        raise RunError(
            "users are not in their bucket",
            seen=f"{len(missing)} missing in {store.path(name)}, first {missing[0]}",
            fix="remove the partition and run again",
        )
    return users


def read_table(store: Store, name: str, filters: Any = None) -> pa.Table:
    """A Parquet object of the store; `filters` as pyarrow.parquet.read_table takes them."""
    source = pa.BufferReader(store.read(name))
    return pq.read_table(source, filters=filters or None)
