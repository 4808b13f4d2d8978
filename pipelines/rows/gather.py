"""Gather the rows of the users whom a run trains: from the shards of many chunks to files in which
each user's rows are together.

Users are in the order of their keys, as in packs, so a pack reads a few row groups of one or two
files. The files are the run's own, under `folder`:

    rows-<n>.parquet    rows of consecutive users, oldest first, with splits (ROWS_SCHEMA)
    rows.json           written last: the first user of each file
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rows.choose import SPLIT_OF, choose_rows
from pipelines.rows.index import IndexRules
from pipelines.rows.shards import TEXT_COLUMNS, Shards, examples_of, open_parquet
from pipelines.rows.wanted import Wanted, read_shards
from ptuning.errors import RunError
from ptuning.store import Store
from ptuning.types import Example

FILE_ROWS = 100_000  # rows per file, at most about
_GROUP_ROWS = 1000  # rows per row group: what one read brings at least
_COLUMNS = ("user_key", "timestamp", *TEXT_COLUMNS)


@dataclass(frozen=True, slots=True)
class GatherJob:
    """Users whose rows go into the file `name`; `keys` are sorted."""

    root: str
    name: str
    rules: IndexRules
    keys: Sequence[str]


def cut_users(users: Sequence[tuple[str, int]], file_rows: int = FILE_ROWS) -> list[list[str]]:
    """Cut users, given as (key, rows) and sorted by key, into the users of each file."""
    files: list[list[str]] = []
    filled = 0
    for key, rows in users:
        if not files or filled + rows > file_rows:
            files.append([])
            filled = 0
        files[-1].append(key)
        filled += rows
    return files


def gather_rows(job: GatherJob, shards: Sequence[Shards]) -> None:
    """Write one file; `shards` are those of the whole partition."""
    store = Store(job.root)
    wanted = Wanted(keys=job.keys)
    table = read_shards(store, shards, job.rules.fit, wanted, texts=True)
    chosen = choose_rows(table, max_rows=job.rules.max_rows, min_examples=job.rules.min_examples)
    rows = table.select(_COLUMNS).take(pa.array(chosen.positions))
    splits = pa.array([SPLIT_OF[code] for code in chosen.codes.tolist()], pa.string())
    rows = rows.append_column("split", splits)
    with store.open_write(job.name) as file:
        pq.write_table(rows, file, compression="lz4", row_group_size=_GROUP_ROWS)


def file_name(folder: str, number: int) -> str:
    return f"{folder}/rows-{number}.parquet"


def commit_rows(store: Store, folder: str, files: Sequence[Sequence[str]]) -> None:
    """Record that all files are written."""
    store.write_json(f"{folder}/rows.json", {"first": [keys[0] for keys in files]})


def is_gathered(store: Store, folder: str) -> bool:
    return store.exists(f"{folder}/rows.json")


def read_users(store: Store, folder: str, user_keys: Sequence[str]) -> dict[str, list[Example]]:
    """The rows of users by key, oldest first, with splits. Raises RunError if one of them has no
    rows there."""
    keys = sorted(set(user_keys))
    firsts = store.read_json(f"{folder}/rows.json")["first"]
    numbers = sorted({bisect_right(firsts, key) - 1 for key in keys} - {-1})
    users: dict[str, list[Example]] = {}
    for number in numbers:
        table = _read_wanted(store, file_name(folder, number), keys)
        splits = table["split"].to_pylist()
        found = zip(table["user_key"].to_pylist(), splits, examples_of(table), strict=True)
        for key, split, example in found:
            users.setdefault(key, []).append(replace(example, split=split))
    missing = [key for key in keys if key not in users]
    if missing:
        raise RunError(
            "users have no rows in the run's folder",
            seen=f"{len(missing)} missing in {store.path(folder)}, first {missing[0]}",
            fix="remove that folder and run again",
        )
    return users


def _read_wanted(store: Store, name: str, keys: Sequence[str]) -> pa.Table:
    wanted = Wanted(keys=keys)
    try:
        file = open_parquet(store, name)
        ranges = [
            file.metadata.row_group(group).column(0).statistics
            for group in range(file.metadata.num_row_groups)
        ]
        groups = [at for at, found in enumerate(ranges) if wanted.may_have(found.min, found.max)]
        table = file.read_row_groups(groups)
    except pa.ArrowException as error:
        raise RunError(
            "a file of gathered rows is damaged",
            seen=f"{store.path(name)}: {error}",
            fix=f"remove {store.path(name.rsplit('/', 1)[0])} and run again",
        ) from error
    return table.filter(wanted.mask(table["user_key"]))
