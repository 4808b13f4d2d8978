"""A partition as the store holds it: its record, and its index.

Nothing of it needs Ray. The rows of users are read by `gather.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.rows.choose import INDEX_SCHEMA
from pipelines.rows.index import Bucket, IndexRules, iterate_index
from pipelines.rows.inputs import Inspected
from pipelines.rows.notices import BadFile, Notice, bad_files_from, notices_from
from ptuning.errors import RunError
from ptuning.store import Store


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The commit record of a finished partition. `seconds` is how long it took.

    `rows_*` count the rows of all files, `files` of them, of which `earlier_files` were delivered
    before. Rows of weight 0 count as read, but are neither kept nor quarantined. `shrunk` counts
    the users who have fewer rows than in the partition before. `notices` say what was not read, was
    lost, or was interpreted in a way worth knowing. `bad_files` are the files with the most
    quarantined rows, with their main reasons.

    With `data.max_users`, `last_user` is the last of the chosen users, as (usable rows, user id);
    the index files have all users.
    """

    partition_id: str
    rules: IndexRules
    rows_read: int
    rows_kept: int
    rows_quarantined: int
    users: int
    too_few: int
    seconds: float
    files: int = 0
    earlier_files: int = 0
    shrunk: int = 0
    buckets: tuple[Bucket, ...] = ()
    last_user: tuple[int, str] | None = None
    notices: tuple[Notice, ...] = ()
    bad_files: tuple[BadFile, ...] = ()
    # The files of this call; not in the record.
    delivered: tuple[Inspected, ...] = field(default=(), compare=False, repr=False)


def partition_folder(partition_id: str) -> str:
    return f"partitions/{partition_id}"


def write_partition(store: Store, part: Partition, more: dict[str, Any]) -> None:
    """Commit a partition; `more` is for people to read."""
    record = dataclasses.asdict(dataclasses.replace(part, delivered=())) | more
    store.write_json(f"{partition_folder(part.partition_id)}/manifest.json", record)


def read_partition(store: Store, partition_id: str) -> Partition | None:
    """The commit record, or None if the partition is not finished."""
    name = f"{partition_folder(partition_id)}/manifest.json"
    if not store.exists(name):
        return None
    record = store.read_json(name)
    values = {part.name: record[part.name] for part in dataclasses.fields(Partition)}
    values["rules"] = IndexRules(**values["rules"])
    values["buckets"] = tuple(Bucket(**bucket) for bucket in values["buckets"])
    values["last_user"] = None if values["last_user"] is None else tuple(values["last_user"])
    values["notices"] = notices_from(values["notices"])
    values["bad_files"] = bad_files_from(values["bad_files"])
    values["delivered"] = ()
    return Partition(**values)


def iterate_users(store: Store, part: Partition) -> Iterator[pa.Table]:
    """The partition's index in parts: one row per user, by user key (INDEX_SCHEMA).

    `rows`, `supervised_tokens`, `first_at`, `last_at` (epoch ms) and `data_digest` are of the kept
    rows of all splits; `usable` and `too_few` are of those before `max_rows` is applied.
    """
    for table in iterate_index(store, part.buckets):
        yield table if part.last_user is None else choose_largest(table, part.last_user)


def choose_largest(table: pa.Table, last: tuple[int, str]) -> pa.Table:
    """The users with at least as many usable rows as the last one to keep; ties by id."""
    rows, user_id = last
    same = pc.and_(pc.equal(table["usable"], rows), pc.less_equal(table["user_id"], user_id))
    return table.filter(pc.or_(pc.greater(table["usable"], rows), same))


def read_index(store: Store, partition_id: str) -> pa.Table:
    """The whole index. Raises RunError if the partition is not finished."""
    part = read_partition(store, partition_id)
    if part is None:
        raise RunError(
            "the partition is not finished", seen=partition_id, fix="partition the data again"
        )
    return pa.concat_tables([INDEX_SCHEMA.empty_table(), *iterate_users(store, part)])
