"""Partition the rows by user: from input files to one sorted file per bucket of users.

Ray Data reads and checks pieces of files and streams them into shards. Then one Ray task per bucket
gathers the bucket's rows from all shards and finishes its users. `partition.json` is written last
and commits the partition. The partition's id is a hash of everything that determines its contents,
so an unfinished partition is simply overwritten.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
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
    INDEX_SCHEMA,
    QUARANTINE_SCHEMA,
    BucketJob,
    Shard,
    UserKeys,
    auto_buckets,
    finish,
    largest,
    read_bad,
    read_blocks,
    shard_of,
    survey,
    write_shard,
)
from pipelines.rows.inputs import Inspected, find_files, inspect
from pipelines.rows.notices import (
    bad_files,
    make_notices,
)
from pipelines.rows.ray_tasks import Progress, cpus, quiet_ray_data, run_all
from pipelines.rows.readers import Piece, describe
from pipelines.rows.stored import Partition, read_partition
from pipelines.rows.streams import InputFile
from ptuning.data.columns import ROW_RULES, ColumnNames, Columns
from ptuning.data.encode import Template
from ptuning.data.examples import NOT_OF_ROWS, DataConfig
from ptuning.errors import DataError, RunError
from ptuning.store import Store

FORMAT = 2  # of everything below partitions/; part of the id
BLOCK_BYTES = 16 << 20  # text per shard, and at most per piece of a file


def make_partition(
    sources: Sequence[str],
    store: Store,
    config: DataConfig,
    backbone: str | Template,
    identity: UserKeys,
    *,
    progress: Progress | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Partition:
    """Partition the rows of `sources` (paths, globs, directories, URIs) by user.

    `backbone` is the name of the model whose tokenizer decides which rows fit, or its Template.
    `identity` is the store's, for the users' keys. A finished partition of the same data,
    configuration, rules and template is reused. Raises DataError (no or unreadable input, too many
    bad rows, a file with only bad rows), or RunError if Ray is not initialised. `block_bytes`
    limits memory and has no other effect. Example:
    `make_partition(["rows.jsonl"], store, DataConfig(), "smollm2", open_identity(store)).users`.
    """
    if not ray.is_initialized():
        raise RunError("Ray is not initialised", fix="call ray.init() before make_partition()")
    started = time.monotonic()
    report = progress or (lambda *_: None)
    listing = find_files(sources)
    files = _inspect(listing.files, block_bytes, report)
    template = backbone if isinstance(backbone, Template) else _template(backbone, config)
    partition_id = partition_id_of(files, config, template, identity)
    if (found := read_partition(store, partition_id)) is not None:
        return _with_unread(found, listing.unread)
    sweep(store, f"partitions/{partition_id}")
    work = _Work(store, partition_id, config, template, identity, files, report, block_bytes)
    try:
        return _with_unread(work.run(started), listing.unread)
    finally:
        remove(store, work.attempt)


def _with_unread(part: Partition, unread: Sequence[str]) -> Partition:
    """The partition with notices about unread files; these are not part of its id, so they may
    differ each time."""
    notices = make_notices({("unread_file", url): 1 for url in unread})
    return dataclasses.replace(part, notices=(*notices, *part.notices))


def _template(backbone: str, config: DataConfig) -> Template:
    from ptuning.model.load import load_template  # imports torch

    return load_template(backbone, config.template)


def partition_id_of(
    files: Sequence[Inspected], config: DataConfig, template: Template, identity: UserKeys
) -> str:
    """The partition's id, 20 hex digits: a hash of the inputs, the rules for reading them, the
    configuration, the template and the identity.

    An input is identified by its name, size, digest and the columns in its folders' names. Its
    location does not matter: the same data elsewhere is the same partition.
    """
    columns = Columns(config.columns)
    inputs = sorted(
        [item.file.name, item.file.size, item.digest, _stated(item.file, columns)] for item in files
    )
    # This key differs between salts but does not reveal the salt.
    keys = identity.user_key("")
    rules = [FORMAT, ROW_RULES]
    settings = config.model_dump(mode="json", exclude=set(NOT_OF_ROWS))
    parts = [rules, inputs, settings, template.digest, keys]
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:20]


def _stated(file: InputFile, columns: Columns) -> list[list[str]]:
    values = dict(file.folders)
    sources = columns.layout(tuple(values)).sources
    return sorted([field, values[name]] for field, name in sources.items())


def _write_table(store: Store, name: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    store.write(name, sink.getvalue().to_pybytes())


# --- inputs --------------------------------------------------------------------------------


def _inspect(files: Sequence[InputFile], block_bytes: int, report: Progress) -> list[Inspected]:
    """Digests and pieces of all files, in the given order; many small files share a task."""
    total = sum(file.size for file in files)
    # Enough pieces for every CPU, but none so small that a task's overhead dominates.
    piece_bytes = max(min(block_bytes, total // (2 * cpus())), min(block_bytes, 1 << 20))
    tasks = [
        partial(_inspect_files, group, piece_bytes)
        for group in _groups(files, lambda file: file.size, 64 << 20)
    ]
    return [item for items in run_all(tasks, "inspect", report) for item in items]


def _inspect_files(files: list[InputFile], piece_bytes: int) -> list[Inspected]:
    return [inspect(file, piece_bytes) for file in files]


def _groups(items: Sequence[Any], size: Callable[[Any], int], limit: int) -> list[list[Any]]:
    """Group consecutive items, up to `limit` bytes and 500 items per group."""
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

    def __init__(
        self, groups: list[list[Piece]], buckets: int, block_bytes: int, names: ColumnNames
    ) -> None:
        super().__init__()
        self._groups, self._buckets, self._block_bytes = groups, buckets, block_bytes
        self._names = names

    def estimate_inmemory_data_size(self) -> int:
        return sum(piece.size for group in self._groups for piece in group)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return [
            ReadTask(
                partial(read_blocks, group, self._buckets, self._block_bytes, self._names),
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
        identity: UserKeys,
        files: list[Inspected],
        report: Progress,
        block_bytes: int,
    ) -> None:
        self.store, self.partition_id, self.config = store, partition_id, config
        self.folder = f"partitions/{partition_id}"
        self.attempt = new_attempt(self.folder)
        self._template, self._identity = template, identity
        self._files, self._report = files, report
        self._block_bytes = block_bytes
        self._buckets = config.buckets or auto_buckets([item.file for item in files])

    def run(self, started: float) -> Partition:
        shards = self._shuffle()
        read = sum(sum(shard.rows) + shard.bad_rows + shard.unlearned for shard in shards)
        parts: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for shard in shards:
            for position, bucket in enumerate(shard.buckets):
                parts[bucket].append((shard.name, position))
        bad = self._read_bad(shards, read)
        jobs = [
            BucketJob(
                self.store.root,
                self.partition_id,
                bucket,
                tuple(parts[bucket]),
                self.config,
                self._identity,
            )
            for bucket in sorted(parts)
        ]
        index, unfit, dropped = self._finish(jobs)
        quarantine = self._check_bad([bad, *unfit], read)
        _write_table(self.store, f"{self.folder}/quarantine.parquet", quarantine)
        _write_table(self.store, f"{self.folder}/index.parquet", index)
        counts = self._notes(shards) + self._lost_users(quarantine, index, dropped)
        counts += self._lost_files(bad, shards)
        result = Partition(
            partition_id=self.partition_id,
            rows_read=read,
            rows_kept=pc.sum(index["rows"]).as_py() or 0,
            rows_quarantined=quarantine.num_rows,
            users=index.num_rows,
            too_few=pc.sum(index["too_few"]).as_py() or 0,
            seconds=round(time.monotonic() - started, 3),
            notices=make_notices(counts),
            bad_files=bad_files(_reasons(quarantine)),
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
                "the inputs contain no rows", seen=f"{len(self._files)} files without content"
            )
        shards, rows = [], 0
        with quiet_ray_data():
            source = _PieceSource(groups, self._buckets, self._block_bytes, self.config.columns)
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
                shards.append(shard_of(row))
                rows += sum(shards[-1].rows) + shards[-1].bad_rows
                self._report("read", rows, 0)
        return shards

    def _read_bad(self, shards: list[Shard], read: int) -> pa.Table:
        """The rows quarantined on reading. Raises DataError if a file could not be read to its end,
        if all rows of a file are bad, or if too many rows are bad."""
        table = read_bad(self.store.root, shards)
        broken = table.filter(pc.equal(table["row"], 0))["reason"].to_pylist()
        if broken:
            raise DataError(broken[0], files=len(broken))
        lost = self._lost_files(table, shards)
        if lost and self.config.max_bad_fraction < 1:
            self._fail_for_files([file for _, file in lost], table)
        self._check_bad([table], read)
        return table

    def _lost_files(self, bad: pa.Table, shards: list[Shard]) -> Counter[tuple[str, str]]:
        """The number of rows in each file whose rows were all bad on reading."""
        used = {file for shard in shards for file in shard.files}
        counts = pc.value_counts(bad["source_file"]).to_pylist()
        return Counter(
            {
                ("lost_file", count["values"]): count["counts"]
                for count in counts
                if count["values"] not in used
            }
        )

    def _fail_for_files(self, files: list[str], bad: pa.Table) -> None:
        name = f"{self.folder}/quarantine.parquet"
        _write_table(self.store, name, bad)
        (first,) = bad_files((file, reason) for file, reason in _reasons(bad) if file == min(files))
        details = [f"{first.file}: {_count_reasons(first.reasons)}"]
        known = {item.file.url: item.file for item in self._files}
        if first.file in known and (found := describe(known[first.file])):
            details.append(found)
        if len(files) > 1:
            details.append(f"so are {len(files) - 1} more files")
        raise DataError(
            "every row of an input file is bad",
            seen="; ".join(details),
            expected="columns user_id, prompt and completion, or user_id and messages",
            fix="repair or omit the file; if its columns have other names, set "
            "data.columns.user_id=NAME etc.; data.max_bad_fraction=1 continues without the file",
            quarantine=self.store.path(name),
            files=len(files),
        )

    def _notes(self, shards: list[Shard]) -> Counter[tuple[str, str]]:
        counts: Counter[tuple[str, str]] = Counter()
        for shard in shards:
            for kind, subject, count in shard.notes:
                counts[kind, subject] += count
        return counts

    def _lost_users(
        self, quarantine: pa.Table, index: pa.Table, dropped: list[str]
    ) -> Counter[tuple[str, str]]:
        """The number of quarantined rows of each user, by key, who has no other rows."""
        ids = quarantine["user_id"].drop_null()
        for known in (index["user_id"], pa.array(dropped, pa.string())):
            ids = ids.filter(pc.invert(pc.is_in(ids, known)))
        key = self._identity.user_key
        return Counter(
            {
                ("lost_user", key(count["values"])): count["counts"]
                for count in pc.value_counts(ids).to_pylist()
            }
        )

    def _finish(self, jobs: list[BucketJob]) -> tuple[pa.Table, list[pa.Table], list[str]]:
        """Finish all buckets; returns the index, the rows that cannot be encoded, and the users
        from whom max_users chose."""
        template = [ray.put(self._template)]
        digest = self._template.digest
        keep: dict[int, frozenset[str]] | None = None
        bad: list[pa.Table] = []
        dropped: list[str] = []
        if self.config.max_users is not None:
            tasks = [partial(_run_job, "survey", job, digest, template, None) for job in jobs]
            surveys = run_all(tasks, "survey", self._report)
            keep = largest([counts for counts, _ in surveys], jobs, self.config.max_users)
            bad = [unfit for _, unfit in surveys]
            dropped = [user_id for counts, _ in surveys for user_id in counts]
        tasks = [
            partial(_run_job, "finish", job, digest, template, keep[job.bucket] if keep else None)
            for job in jobs
            if keep is None or keep[job.bucket]
        ]
        finished = run_all(tasks, "finish", self._report)
        index = pa.concat_tables([INDEX_SCHEMA.empty_table(), *(table for table, _ in finished)])
        # The survey includes the rows of dropped users, so its count of bad rows is complete.
        bad = bad or [unfit for _, unfit in finished]
        return index.sort_by("user_id").combine_chunks(), bad, dropped

    def _check_bad(self, tables: list[pa.Table], read: int) -> pa.Table:
        """All quarantined rows, sorted. If they are too many, writes them to disk and raises
        DataError."""
        table = pa.concat_tables([QUARANTINE_SCHEMA.empty_table(), *tables])
        table = table.sort_by([("source_file", "ascending"), ("row", "ascending")])
        if not read:
            raise DataError("the inputs contain no rows", seen=f"{len(self._files)} files")
        if table.num_rows / read <= self.config.max_bad_fraction:
            return table
        name = f"{self.folder}/quarantine.parquet"
        _write_table(self.store, name, table)
        common = Counter(table["reason"].to_pylist()).most_common(3)
        worst = bad_files(_reasons(table), 3)
        raise DataError(
            "too many input rows are bad",
            seen=f"{table.num_rows} of {read} rows; most often: {_count_reasons(common)}; most in "
            + ", ".join(f"{file.file} ({file.rows})" for file in worst),
            expected=f"at most data.max_bad_fraction = {self.config.max_bad_fraction:g} of them",
            fix=f"see {self.store.path(name)} for each row's file, number and reason",
            quarantine=self.store.path(name),
        )


def _reasons(quarantine: pa.Table) -> Iterator[tuple[str, str]]:
    """The file and the reason of each row."""
    for batch in quarantine.to_batches(max_chunksize=1 << 16):
        yield from zip(batch["source_file"].to_pylist(), batch["reason"].to_pylist(), strict=True)


def _count_reasons(reasons: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{reason} ({count})" for reason, count in reasons)


# --- tasks ---------------------------------------------------------------------------------

_templates: dict[str, Template] = {}  # cache of this worker process by digest, at most one entry


def _run_job(
    kind: Literal["survey", "finish"],
    job: BucketJob,
    digest: str,
    template: list[Any],
    keep: frozenset[str] | None,
) -> Any:
    """Run a bucket's task in a worker process, which unpickles the tokenizer only once.

    The template's reference is wrapped in a list because Ray would otherwise fetch it for each
    task.
    """
    if digest not in _templates:
        _templates.clear()
        _templates[digest] = ray.get(template[0])
    if kind == "survey":
        return survey(job, _templates[digest])
    return finish(job, _templates[digest], keep)
