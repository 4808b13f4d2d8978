"""Read the rows of chosen users from the shards of many chunks.

A shard is sorted by user key, and Parquet keeps the least and greatest key of each row group. So
only row groups that may have a wanted user are read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.rows.choose import ROW_COLUMNS
from pipelines.rows.shards import SHARD_SCHEMA, TEXT_COLUMNS, Shards, open_parquet
from ptuning.store import Store


@dataclass(frozen=True, slots=True)
class Wanted:
    """The users whose keys are at least `first` and less than `end`, or, of these, only the sorted
    `keys`."""

    first: str = ""
    end: str = "~"
    keys: Sequence[str] | None = None

    def may_have(self, low: str, high: str) -> bool:
        """Whether a wanted key may be in [low, high]."""
        if high < self.first or low >= self.end:
            return False
        if self.keys is None:
            return True
        at = bisect_left(self.keys, max(low, self.first))
        return at < len(self.keys) and self.keys[at] <= high

    def mask(self, keys: pa.ChunkedArray) -> pa.ChunkedArray:
        inside = pc.and_(pc.greater_equal(keys, self.first), pc.less(keys, self.end))
        if self.keys is None:
            return inside
        return pc.and_(inside, pc.is_in(keys, pa.array(self.keys, pa.string())))


def read_shards(
    store: Store, shards: Sequence[Shards], fit: str, wanted: Wanted, texts: bool = False
) -> pa.Table:
    """The rows of wanted users that can be encoded, from the folders of many chunks.

    The columns are ROW_COLUMNS, and with `texts` the TEXT_COLUMNS too; `fit` is the name of the
    rules by which the rows were measured (fits.py). Of each shard, only the row groups that may
    have a wanted user are read.
    """
    stored = [name for name in ROW_COLUMNS if name != "supervised"]
    columns = [*stored, *(TEXT_COLUMNS if texts else ())]
    schema = pa.schema(
        [*(SHARD_SCHEMA.field(name) for name in columns), ("supervised", pa.int32())]
    )
    tables = [schema.empty_table()]
    for made in shards:
        for number in range(made.shards):
            rows = open_parquet(store, f"{made.name}/shard-{number}.parquet")
            groups = [at for at, low, high in _key_ranges(rows) if wanted.may_have(low, high)]
            if not groups:
                continue
            fits = open_parquet(store, f"{made.name}/fit-{fit}-{number}.parquet")
            supervised = fits.read_row_groups(groups, ["supervised"])["supervised"]
            keys = rows.read_row_groups(groups, ["user_key"])["user_key"]
            mask = pc.and_(wanted.mask(keys), pc.greater(supervised, 0))
            if pc.any(mask).as_py():
                table = rows.read_row_groups(groups, columns)
                tables.append(table.append_column("supervised", supervised).filter(mask))
    return pa.concat_tables(tables)


def read_keys(store: Store, made: Shards) -> pa.Array:
    """The keys of the users with good rows in a chunk."""
    tables = [
        open_parquet(store, f"{made.name}/shard-{number}.parquet").read(["user_key"])["user_key"]
        for number in range(made.shards)
    ]
    return pc.unique(pa.chunked_array(tables, pa.string()))


def _key_ranges(file: pq.ParquetFile) -> Iterator[tuple[int, str, str]]:
    """Number, least and greatest user key of each row group."""
    metadata = file.metadata
    at = SHARD_SCHEMA.get_field_index("user_key")
    for group in range(metadata.num_row_groups):
        found = metadata.row_group(group).column(at).statistics
        yield group, found.min, found.max
