"""Everyone's rows, put apart: input files to one sorted file per bucket of users.

Ray Data reads and checks the pieces of the files and streams them into shards; one Ray task
per bucket then gathers that bucket's rows from all shards and finishes its users. The
partition counts once `partition.json` is there, which is written last; its id is a hash of
all that decides its content, so an unfinished one is simply made again over itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipelines.rows.attempts import new_attempt, remove, sweep
from pipelines.rows.buckets import (
    BAD,
    INDEX_SCHEMA,
    QUARANTINE_SCHEMA,
    BucketJob,
    Shard,
    auto_buckets,
    bucket_folder,
    example_of,
    finish,
    largest,
    read_blocks,
    read_shards,
    survey,
    write_shard,
)
from pipelines.rows.inputs import InputFile, Inspected, Piece, find_files, inspect
from pipelines.rows.ray_tasks import Progress, cpus, quiet_ray_data, run_all
from ptuning.data.encode import Template
from ptuning.data.examples import NOT_OF_ROWS, DataConfig
from ptuning.errors import DataError, RunError
from ptuning.store import Store
from ptuning.types import Example

FORMAT = 1  # of everything below partitions/; part of the id
BLOCK_BYTES = 16 << 20  # text of one shard, and at most of one piece of a file


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A finished partition: the commit record. `seconds` is what making it took."""

    partition_id: str
    rows_read: int
    rows_kept: int
    rows_quarantined: int
    users: int
    too_few: int
    seconds: float


def partition(
    sources: Sequence[str],
    store: Store,
    config: DataConfig,
    backbone: str | Template,
    *,
    progress: Progress | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Partition:
    """Partition the rows of `sources` (paths, globs, directories, URIs) by user.

    `backbone` names the model whose tokenizer decides which rows fit, or is its Template.
    A finished partition of the same data, configuration and template is found again. Raises
    DataError (no or unreadable input, too many bad rows), RunError where Ray is not
    initialised. `block_bytes` bounds memory and changes nothing else.
    """
    if not ray.is_initialized():
        raise RunError("Ray is not initialised", fix="call ray.init() before partition()")
    started = time.monotonic()
    report = progress or (lambda *_: None)
    files = _inspect(find_files(sources), block_bytes, report)
    template = backbone if isinstance(backbone, Template) else _template(backbone, config)
    partition_id = partition_id_of(files, config, template)
    if (found := read_partition(store, partition_id)) is not None:
        return found
    sweep(store, f"partitions/{partition_id}")
    work = _Work(store, partition_id, config, template, files, report, block_bytes)
    try:
        return work.run(started)
    finally:
        remove(store, work.attempt)


def _template(backbone: str, config: DataConfig) -> Template:
    from ptuning.model.load import load_template  # imports torch

    return load_template(backbone, config.template)


def partition_id_of(files: Sequence[Inspected], config: DataConfig, template: Template) -> str:
    """20 hex digits: names, sizes and digests of the inputs, configuration, template.

    Names without folders: the same data elsewhere is the same partition.
    """
    inputs = sorted([item.file.name, item.file.size, item.digest] for item in files)
    rows = config.model_dump(mode="json", exclude=set(NOT_OF_ROWS))
    parts = [FORMAT, inputs, rows, template.digest]
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:20]


def read_partition(store: Store, partition_id: str) -> Partition | None:
    """The commit record, or None where the partition is not finished."""
    name = f"partitions/{partition_id}/partition.json"
    if not store.exists(name):
        return None
    record = store.read_json(name)
    return Partition(**{field.name: record[field.name] for field in dataclasses.fields(Partition)})


def read_index(store: Store, partition_id: str) -> pa.Table:
    """One row per user, sorted by id (INDEX_SCHEMA). RunError where it is not finished.

    `rows`, `supervised_tokens`, `first_at`, `last_at` (epoch ms) and `data_digest` are of
    the kept rows of all splits; `too_few` was decided before `max_rows`.
    """
    if read_partition(store, partition_id) is None:
        raise RunError(
            "the partition is not finished", seen=partition_id, fix="partition the data again"
        )
    return _read_table(store, f"partitions/{partition_id}/index.parquet")


def read_users(
    store: Store, partition_id: str, bucket: int, user_keys: Sequence[str] | None = None
) -> dict[str, list[Example]]:
    """Rows of a bucket's users by user id, oldest first, splits set.

    `user_keys` names the users to read (None: all). RunError where one is not in the bucket.
    """
    name = f"{bucket_folder(partition_id, bucket)}/part-0.parquet"
    users: dict[str, list[Example]] = {}
    keys: set[str] = set()
    if store.exists(name):
        wanted = None if user_keys is None else [("user_key", "in", sorted(set(user_keys)))]
        for values in _read_table(store, name, wanted).to_pylist():
            users.setdefault(values["user_id"], []).append(example_of(values))
            keys.add(values["user_key"])
    missing = sorted(set(user_keys or ()) - keys)
    if missing:
        raise RunError(
            "users are not in their bucket",
            seen=f"{len(missing)} missing in {store.path(name)}, first {missing[0]}",
            fix="remove the partition and run again",
        )
    return users


def _read_table(store: Store, name: str, filters: Any = None) -> pa.Table:
    source = pa.BufferReader(store.read(name))
    return pq.read_table(source, filters=filters or None)


def _write_table(store: Store, name: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    store.write(name, sink.getvalue().to_pybytes())


# --- inputs --------------------------------------------------------------------------------


def _inspect(files: list[InputFile], block_bytes: int, report: Progress) -> list[Inspected]:
    """Digests and pieces of all files, in their order; many small files share a task."""
    total = sum(file.size for file in files)
    # Enough pieces that every CPU has some, none so small that a task costs more than it does.
    piece_bytes = max(min(block_bytes, total // (2 * cpus())), min(block_bytes, 1 << 20))
    tasks = [
        partial(_inspect_files, group, piece_bytes)
        for group in _groups(files, lambda file: file.size, 64 << 20)
    ]
    return [item for items in run_all(tasks, "inspect", report) for item in items]


def _inspect_files(files: list[InputFile], piece_bytes: int) -> list[Inspected]:
    return [inspect(file, piece_bytes) for file in files]


def _groups(items: Sequence[Any], size: Callable[[Any], int], limit: int) -> list[list[Any]]:
    """Neighbours together up to `limit` bytes and 500 items."""
    groups: list[list[Any]] = []
    filled = 0
    for item in items:
        if not groups or filled + size(item) > limit or len(groups[-1]) >= 500:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size(item)
    return groups


class _PieceSource(Datasource):
    """Pieces of files as a Ray Data source: one read task per group of pieces."""

    def __init__(self, groups: list[list[Piece]], buckets: int, block_bytes: int) -> None:
        super().__init__()
        self._groups, self._buckets, self._block_bytes = groups, buckets, block_bytes

    def estimate_inmemory_data_size(self) -> int:
        return sum(piece.size for group in self._groups for piece in group)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return [
            ReadTask(
                partial(read_blocks, group, self._buckets, self._block_bytes),
                BlockMetadata(None, sum(piece.size for piece in group), None, None),
            )
            for group in self._groups
        ]


# --- the work ------------------------------------------------------------------------------


class _Work:
    """One attempt at one partition."""

    def __init__(
        self,
        store: Store,
        partition_id: str,
        config: DataConfig,
        template: Template,
        files: list[Inspected],
        report: Progress,
        block_bytes: int,
    ) -> None:
        self.store, self.partition_id, self.config = store, partition_id, config
        self.folder = f"partitions/{partition_id}"
        self.attempt = new_attempt(self.folder)
        self._template, self._files, self._report = template, files, report
        self._block_bytes = block_bytes
        self._buckets = config.buckets or auto_buckets([item.file for item in files])

    def run(self, started: float) -> Partition:
        shards = self._shuffle()
        read = sum(sum(shard.rows) for shard in shards)
        parts: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for shard in shards:
            for position, bucket in enumerate(shard.buckets):
                parts[bucket].append((shard.name, position))
        bad = [self._bad_rows(parts.pop(BAD, []))]
        self._check_bad(bad, read)
        jobs = [
            BucketJob(self.store.root, self.partition_id, bucket, tuple(parts[bucket]), self.config)
            for bucket in sorted(parts)
        ]
        index, unfit = self._finish(jobs)
        quarantine = self._check_bad([*bad, *unfit], read)
        _write_table(self.store, f"{self.folder}/quarantine.parquet", quarantine)
        _write_table(self.store, f"{self.folder}/index.parquet", index)
        result = Partition(
            partition_id=self.partition_id,
            rows_read=read,
            rows_kept=sum(index["rows"].to_pylist()),
            rows_quarantined=quarantine.num_rows,
            users=index.num_rows,
            too_few=sum(index["too_few"].to_pylist()),
            seconds=round(time.monotonic() - started, 3),
        )
        self._commit(result)
        return result

    def _commit(self, result: Partition) -> None:
        record = dataclasses.asdict(result) | {
            "format": FORMAT,
            "buckets": self._buckets,
            "config": self.config.model_dump(mode="json"),
            "inputs": [
                {"name": item.file.name, "size": item.file.size, "sha256": item.digest}
                for item in self._files
            ],
        }
        self.store.write_json(f"{self.folder}/partition.json", record)

    def _shuffle(self) -> list[Shard]:
        pieces = [piece for item in self._files for piece in item.pieces]
        groups = _groups(pieces, lambda piece: piece.size, self._block_bytes)
        if not groups:
            raise DataError(
                "the inputs hold no rows", seen=f"{len(self._files)} files without content"
            )
        shards, rows = [], 0
        with quiet_ray_data():
            source = _PieceSource(groups, self._buckets, self._block_bytes)
            written = ray.data.read_datasource(
                source, num_cpus=1, override_num_blocks=len(groups)
            ).map_batches(
                write_shard,
                batch_size=None,
                batch_format="pyarrow",
                zero_copy_batch=True,
                fn_kwargs={"root": self.store.root, "folder": self.attempt},
                num_cpus=1,
            )
            for row in written.iter_rows():
                shards.append(Shard(row["name"], tuple(row["buckets"]), tuple(row["rows"])))
                rows += sum(row["rows"])
                self._report("read", rows, 0)
        return shards

    def _bad_rows(self, parts: list[tuple[str, int]]) -> pa.Table:
        table = read_shards(self.store.root, parts).select(QUARANTINE_SCHEMA.names)
        broken = table.filter(pc.equal(table["row"], 0))["reason"].to_pylist()
        if broken:
            raise DataError(broken[0], files=len(broken))
        return table

    def _finish(self, jobs: list[BucketJob]) -> tuple[pa.Table, list[pa.Table]]:
        """The index, and the rows that cannot be encoded, of each bucket."""
        template = [ray.put(self._template)]
        digest = self._template.digest
        keep: dict[int, frozenset[str]] | None = None
        bad: list[pa.Table] = []
        if self.config.max_users is not None:
            tasks = [partial(_run_job, "survey", job, digest, template, None) for job in jobs]
            surveys = run_all(tasks, "survey", self._report)
            keep = largest([counts for counts, _ in surveys], jobs, self.config.max_users)
            bad = [unfit for _, unfit in surveys]
        tasks = [
            partial(_run_job, "finish", job, digest, template, keep[job.bucket] if keep else None)
            for job in jobs
            if keep is None or keep[job.bucket]
        ]
        finished = run_all(tasks, "finish", self._report)
        index = pa.concat_tables([INDEX_SCHEMA.empty_table(), *(table for table, _ in finished)])
        # With a survey, the rows of dropped users are in it too: theirs are the whole count.
        bad = bad or [unfit for _, unfit in finished]
        return index.sort_by("user_id").combine_chunks(), bad

    def _check_bad(self, tables: list[pa.Table], read: int) -> pa.Table:
        """All quarantined rows in order; DataError, with them on disk, where they are too many."""
        table = pa.concat_tables([QUARANTINE_SCHEMA.empty_table(), *tables])
        table = table.sort_by([("source_file", "ascending"), ("row", "ascending")])
        if not read:
            raise DataError("the inputs hold no rows", seen=f"{len(self._files)} files")
        if table.num_rows / read <= self.config.max_bad_fraction:
            return table
        name = f"{self.folder}/quarantine.parquet"
        _write_table(self.store, name, table)
        common = Counter(table["reason"].to_pylist()).most_common(3)
        raise DataError(
            "too many input rows are bad",
            seen=f"{table.num_rows} of {read} rows; most often: "
            + ", ".join(f"{reason} ({count})" for reason, count in common),
            expected=f"at most data.max_bad_fraction = {self.config.max_bad_fraction:g} of them",
            fix=f"see {self.store.path(name)} for each row's file, number and reason",
            quarantine=self.store.path(name),
        )


# --- tasks ---------------------------------------------------------------------------------

_templates: dict[str, Template] = {}  # of this worker process, by digest: at most one


def _run_job(
    kind: Literal["survey", "finish"],
    job: BucketJob,
    digest: str,
    template: list[Any],
    keep: frozenset[str] | None,
) -> Any:
    """A bucket's work in a worker process, which unpickles the tokenizer once.

    The template's reference comes in a list, or Ray would fetch it anew for each task.
    """
    if digest not in _templates:
        _templates.clear()
        _templates[digest] = ray.get(template[0])
    if kind == "survey":
        return survey(job, _templates[digest])
    return finish(job, _templates[digest], keep)
