"""Partition the rows by user: from input files to shards by chunk, and from these to an index.

What was read before is not read again. A file whose stamp has not changed is not opened; of a file
that has changed, only the chunks with new contents are read; of the users, only those with rows in
chunks that came or went are indexed anew. `manifest.json` is written last and commits the
partition. Its id is a hash of everything that determines its contents, so an unfinished partition
is simply made again.

Ray Data reads the chunks, as a stream of tasks; the index is made by one Ray task per range of user
keys, where all rows of a user meet, so no block or file boundary can split a user.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray import cloudpickle

from pipelines.rows.fits import fit_name, measure
from pipelines.rows.gather import GatherJob, commit_rows, cut_users, file_name, gather_rows
from pipelines.rows.index import (
    BUCKET_ROWS,
    Bucket,
    IndexJob,
    IndexRules,
    bucket_ranges,
    count_shrunk,
    index_buckets,
    iterate_index,
)
from pipelines.rows.inputs import CHUNK_BYTES, Inspected, Listing, find_files, inspect
from pipelines.rows.manifest import (
    Delivered,
    Entry,
    add_delivery,
    chunks_name,
    drop_copies,
    read_delivered,
    read_entries,
    write_entries,
)
from pipelines.rows.notices import make_notices
from pipelines.rows.quarantine import Quarantine, check_bad, find_lost_files, write_quarantine
from pipelines.rows.ray_tasks import (
    Progress,
    Shared,
    call_with,
    cpus,
    make_groups,
    quiet_ray_data,
    run_all,
    split_evenly,
)
from pipelines.rows.shards import (
    ChunkJob,
    Shards,
    UserKeys,
    chunk_name,
    count_notes,
    make_shards,
)
from pipelines.rows.stored import (
    Partition,
    choose_largest,
    iterate_users,
    partition_folder,
    read_partition,
    write_partition,
)
from pipelines.rows.streams import InputFile
from pipelines.rows.wanted import read_keys
from ptuning.data.encode import Template
from ptuning.data.examples import DataConfig
from ptuning.errors import DataError, PTuningError, RunError
from ptuning.store import Store

FORMAT = 3  # of everything below partitions/; part of the id
_JOB_USERS = 20_000  # changed users per indexing task


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """How the work is cut. They bound memory and have no other effect; tests make them small."""

    chunk_bytes: int = CHUNK_BYTES
    bucket_rows: int = BUCKET_ROWS


def make_partition(
    sources: Sequence[str],
    store: Store,
    config: DataConfig,
    backbone: str | Template,
    identity: UserKeys,
    *,
    series: str = "default",
    progress: Progress | None = None,
    sizes: Sizes | None = None,
) -> Partition:
    """Partition the rows of `sources` (paths, globs, directories, URIs) by user; under
    `data.delivery=append` with the rows that were delivered to this store before, in the same
    `series`: users' prefixes of different names may be trained on different data.

    `backbone` is the name of the model whose tokenizer decides which rows fit, or its Template.
    `identity` is the store's, for the users' keys. A finished partition of the same data,
    configuration, rules and template is reused. Raises DataError (no or unreadable input, too many
    bad rows, a file with only bad rows), or RunError if Ray is not initialised. The files count as
    delivered once `record_delivery` is called with the partition's `delivered`. Example:
    `make_partition(["rows.jsonl"], store, DataConfig(), "smollm2", open_identity(store)).users`.
    """
    if not ray.is_initialized():
        raise RunError("Ray is not initialised", fix="call ray.init() before make_partition()")
    listing = find_files(sources)
    template = backbone if isinstance(backbone, Template) else _load_template(backbone, config)
    work = _Work(store, config, template, identity, listing, progress, sizes or Sizes())
    return work.run(read_delivered(store, series))


def _load_template(backbone: str, config: DataConfig) -> Template:
    from ptuning.model.load import load_template  # imports torch

    return load_template(backbone, config.template)


def gather_users(
    store: Store,
    part: Partition,
    users: Sequence[tuple[str, int]],
    folder: str,
    progress: Progress | None = None,
) -> None:
    """Bring the rows of each user together, in files below `folder` (gather.py). `users` are (key,
    rows), sorted by key."""
    entries = read_entries(store, chunks_name(part.partition_id))
    shards = Shared([entry.shards for entry in entries if entry.shards.rows])
    files = cut_users(users)
    jobs = [
        GatherJob(store.root, file_name(folder, number), part.rules, keys)
        for number, keys in enumerate(files)
    ]
    tasks = [partial(call_with, gather_rows, job, shards) for job in jobs]
    run_all(tasks, "gather", progress or (lambda *_: None))
    commit_rows(store, folder, files)


class _Work:
    """The making of one partition."""

    def __init__(
        self,
        store: Store,
        config: DataConfig,
        template: Template,
        identity: UserKeys,
        listing: Listing,
        progress: Progress | None,
        sizes: Sizes,
    ) -> None:
        self.store, self.config, self.listing, self.sizes = store, config, listing, sizes
        self._template, self._identity = template, identity
        self._report = progress or (lambda *_: None)
        fit = fit_name(template.digest, config.max_length)
        self.rules = IndexRules(fit, config.max_rows, config.min_examples)
        self.started = time.monotonic()

    def run(self, before: Delivered) -> Partition:
        """The partition of what was delivered before and is delivered now."""
        delivered = self._inspect(before.files)
        files = add_delivery(before.files, delivered, self.config.delivery)
        kept, copies = drop_copies([(item, self._names(item)) for item in files])
        partition_id = self._partition_id(name for _, names in kept for name in names)
        part = read_partition(self.store, partition_id)
        if part is None:
            part = self._make(partition_id, kept, before.partition_id)
        here = {file.url for file in self.listing.files}
        notices = {("unread_file", url): 1 for url in self.listing.unread}
        notices |= {("copied_file", url): 1 for url in copies}
        return dataclasses.replace(
            part,
            files=len(files),
            earlier_files=sum(item.file.url not in here for item in files),
            shrunk=self._count_shrunk(before.partition_id, part),
            notices=(*make_notices(notices), *part.notices),
            delivered=tuple(delivered),
        )

    def _count_shrunk(self, before: str, now: Partition) -> int:
        old = read_partition(self.store, before) if before else None
        if old is None or old.buckets == now.buckets:
            return 0
        parts = [list(part) for part in split_evenly(old.buckets, 2 * cpus())]
        tasks = [partial(count_shrunk, self.store.root, part, now.buckets) for part in parts]
        return sum(run_all(tasks, "compare", self._report))

    def _inspect(self, known: dict[str, Inspected]) -> list[Inspected]:
        """The listed files. Only those are opened whose stamp is not known, or may be out of
        date."""
        found: dict[str, Inspected] = {}
        new = []
        for file in self.listing.files:
            item = known.get(file.url)
            if item is not None and _is_known(item.file, file):
                found[file.url] = item
            else:
                new.append(file)
        tasks = [
            partial(_inspect_files, group, self.sizes.chunk_bytes)
            for group in make_groups(new, lambda file: file.size)
        ]
        if tasks:
            inspected = run_all(tasks, "inspect", self._report)
            found |= {item.file.url: item for items in inspected for item in items}
        return [found[file.url] for file in self.listing.files]

    def _names(self, item: Inspected) -> tuple[str, ...]:
        columns, identity = self.config.columns, self._identity
        return tuple(chunk_name(chunk, item.file, columns, identity) for chunk in item.chunks)

    def _partition_id(self, names: Iterable[str]) -> str:
        """20 hex digits: a hash of the chunks and of the settings. Where the files are does not
        matter: the same data elsewhere is the same partition."""
        settings = [FORMAT, *dataclasses.astuple(self.rules)]
        settings += [self.config.max_users, self.config.max_bad_fraction]
        text = json.dumps([settings, sorted(names)])
        return hashlib.sha256(text.encode("ascii")).hexdigest()[:20]

    def _make(
        self,
        partition_id: str,
        files: Sequence[tuple[Inspected, tuple[str, ...]]],
        before: str,
    ) -> Partition:
        folder = partition_folder(partition_id)
        known = read_entries(self.store, chunks_name(before)) if before else []
        base, base_entries = self._base()
        entries = self._read(files, [*known, *base_entries], base_entries)
        chunks = [entry for entry in entries if entry.chunk is not None]
        read = sum(entry.shards.read for entry in chunks)
        if not read:
            raise DataError("the inputs contain no rows", seen=f"{len(files)} files")
        here = {file.url for file in self.listing.files}
        mine = [entry for entry in chunks if entry.file.url in here]
        check_bad(self.store, folder, mine, self.rules.fit, self.config.max_bad_fraction)
        buckets = self._index(chunks, base, base_entries)
        part = Partition(
            partition_id=partition_id,
            rules=self.rules,
            rows_read=read,
            rows_kept=sum(bucket.rows for bucket in buckets),
            rows_quarantined=sum(entry.bad for entry in chunks),
            users=sum(bucket.users for bucket in buckets),
            too_few=sum(bucket.too_few for bucket in buckets),
            seconds=0.0,
            files=len(files),
            buckets=tuple(buckets),
        )
        part = self._limit_users(part)
        bad = write_quarantine(self.store, folder, chunks, self.rules.fit)
        counts = count_notes([entry.shards for entry in chunks])
        users = _find_lost_users(self.store, bad, part)
        counts += Counter({("lost_user", key): rows for key, rows in users.items()})
        lost = find_lost_files(chunks)
        counts += Counter({("lost_file", url): rows for url, rows in lost.items()})
        part = dataclasses.replace(
            part,
            seconds=round(time.monotonic() - self.started, 3),
            notices=make_notices(counts),
            bad_files=bad.files,
        )
        write_entries(self.store, chunks_name(partition_id), entries)
        write_partition(self.store, part, {"config": self.config.model_dump(mode="json")})
        self.store.write_json(self._latest, {"partition_id": partition_id})
        return part

    # --- the base ---------------------------------------------------------------------------

    @property
    def _latest(self) -> str:
        """Where the newest partition with these rules is named."""
        text = json.dumps([FORMAT, *dataclasses.astuple(self.rules)])
        return f"partitions/latest/{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def _base(self) -> tuple[Partition | None, list[Entry]]:
        """The newest partition with the same rules, from which the index is brought up to date."""
        if not self.store.exists(self._latest):
            return None, []
        partition_id = self.store.read_json(self._latest)["partition_id"]
        base = read_partition(self.store, partition_id)
        return base, [] if base is None else read_entries(self.store, chunks_name(partition_id))

    # --- chunks to shards -------------------------------------------------------------------

    def _read(
        self,
        files: Sequence[tuple[Inspected, tuple[str, ...]]],
        known: Iterable[Entry],
        measured: Iterable[Entry],
    ) -> list[Entry]:
        """An entry per chunk; those that no partition knows are read. `measured` were measured by
        the same rules."""
        unfit = {entry.shards.name: entry.unfit for entry in measured}
        made = {entry.shards.name: entry.shards for entry in known}
        made = {name: shards for name, shards in made.items() if name in unfit}
        jobs: dict[str, ChunkJob] = {}
        for item, names in files:
            for chunk, name in zip(item.chunks, names, strict=True):
                if name not in made:
                    jobs[name] = ChunkJob(
                        self.store.root,
                        name,
                        item.file,
                        chunk,
                        self.config.columns,
                        self._identity,
                    )
        rows = 0
        for shards, count in self._read_chunks(list(jobs.values())):
            if shards.broken:
                raise DataError(shards.broken)
            made[shards.name], unfit[shards.name] = shards, count
            rows += shards.read
            self._report("read", rows, 0)
        entries = []
        for item, names in files:
            for chunk, name in zip(item.chunks, names, strict=True):
                entries.append(Entry(item.file, chunk, made[name], unfit[name]))
            if not names:
                entries.append(Entry(item.file, None, Shards("")))
        return entries

    def _read_chunks(self, jobs: Sequence[ChunkJob]) -> Iterator[tuple[Shards, int]]:
        """Read chunks and measure their rows, by Ray Data."""
        if not jobs:
            return
        groups = make_groups(jobs, lambda job: job.chunk.size)
        items = [{"jobs": cloudpickle.dumps(group)} for group in groups]
        template = [ray.put(self._template)]
        with quiet_ray_data():
            source = ray.data.from_items(items, override_num_blocks=len(items))
            read = source.map(
                cast(Any, _read_group),
                fn_kwargs={
                    "digest": self._template.digest,
                    "template": template,
                    "max_length": self.config.max_length,
                },
                num_cpus=1,
            )
            for row in read.iter_rows():
                yield from pickle.loads(row["made"])

    # --- the index --------------------------------------------------------------------------

    def _index(
        self, entries: Sequence[Entry], base: Partition | None, base_entries: Sequence[Entry]
    ) -> list[Bucket]:
        good = [entry.shards for entry in entries if entry.shards.rows]
        ranges = bucket_ranges(sum(made.rows for made in good), self.sizes.bucket_rows)
        keys = None
        if base is not None:
            keys = self._changed(good, [entry.shards for entry in base_entries])
        if base is None or keys is None:
            jobs = [IndexJob(self.store.root, (bounds,), self.rules) for bounds in ranges]
            return self._run_index(jobs, good)
        kept = {(bucket.first, bucket.end): bucket for bucket in base.buckets}
        touched: list[tuple[str, str]] = []
        done: list[Bucket] = []
        for first, end in ranges:
            old = kept.get((first, end))
            if old is None or _any_between(keys, first, end):
                touched.append((first, end))
            else:
                done.append(old)
        jobs = [
            IndexJob(
                self.store.root,
                tuple(group),
                self.rules,
                _between(keys, group[0][0], group[-1][1]),
                base.buckets,
            )
            for group in split_evenly(touched, max(2 * cpus(), len(keys) // _JOB_USERS))
        ]
        return sorted([*done, *self._run_index(jobs, good)], key=lambda bucket: bucket.first)

    def _run_index(self, jobs: Sequence[IndexJob], good: list[Shards]) -> list[Bucket]:
        shards = Shared(good)
        tasks = [partial(call_with, index_buckets, job, shards) for job in jobs]
        return [bucket for made in run_all(tasks, "index", self._report) for bucket in made]

    def _changed(self, now: Sequence[Shards], before: Sequence[Shards]) -> list[str] | None:
        """The sorted keys of the users with rows in chunks that came or went; None if so many
        chunks did that everybody may as well be indexed."""
        names, old_names = (Counter(made.name for made in some) for some in (now, before))
        moved = (names - old_names) + (old_names - names)
        found = {made.name: made for made in (*now, *before) if made.name in moved and made.rows}
        rows = sum(made.rows * moved[name] for name, made in found.items())
        if 2 * rows > sum(made.rows for made in now):
            return None
        groups = make_groups(list(found.values()), lambda made: made.rows * 64)
        tasks = [partial(_read_group_keys, self.store.root, group) for group in groups]
        arrays = run_all(tasks, "changes", self._report) if tasks else []
        unique = pc.unique(pa.chunked_array(arrays, pa.string()))
        return sorted(unique.to_pylist())

    def _limit_users(self, part: Partition) -> Partition:
        """The partition with the users with the most rows only, if `data.max_users` says so."""
        most = self.config.max_users
        if most is None or part.users <= most:
            return part
        columns = [table.select(["usable", "user_id"]) for table in iterate_users(self.store, part)]
        order = [("usable", "descending"), ("user_id", "ascending")]
        last = pa.concat_tables(columns).sort_by(order).slice(most - 1, 1).to_pylist()[0]
        last_user = (last["usable"], last["user_id"])
        index = pa.concat_tables(
            [choose_largest(table, last_user) for table in iterate_users(self.store, part)]
        )
        return dataclasses.replace(
            part,
            last_user=last_user,
            users=index.num_rows,
            too_few=pc.sum(index["too_few"]).as_py(),
            rows_kept=pc.sum(index["rows"]).as_py(),
        )


def _find_lost_users(store: Store, bad: Quarantine, part: Partition) -> dict[str, int]:
    """The number of quarantined rows of each user, by key, who has no other rows."""
    lost = dict(bad.by_user)
    for table in iterate_index(store, part.buckets) if lost else ():
        for key in table["user_key"].to_pylist():
            lost.pop(key, None)
    return lost


def _between(keys: Sequence[str], first: str, end: str) -> list[str]:
    return list(keys[bisect_left(keys, first) : bisect_left(keys, end)])


def _any_between(keys: Sequence[str], first: str, end: str) -> bool:
    at = bisect_left(keys, first)
    return at < len(keys) and keys[at] < end


def _is_known(before: InputFile, now: InputFile) -> bool:
    """Whether a file is surely as it was when it was inspected."""
    return bool(now.stamp) and now.stamp == before.stamp and not before.is_fresh


# --- tasks ---------------------------------------------------------------------------------


def _inspect_files(files: list[InputFile], chunk_bytes: int) -> list[Inspected]:
    return [inspect(file, chunk_bytes) for file in files]


def _read_group_keys(root: str, group: Sequence[Shards]) -> pa.Array:
    arrays = [read_keys(Store(root), made) for made in group]
    return pc.unique(pa.chunked_array(arrays, pa.string()))


_templates: dict[str, Template] = {}  # cache of this worker process by digest, at most one entry


def _read_group(
    row: dict[str, Any], *, digest: str, template: list[Any], max_length: int
) -> dict[str, Any]:
    """Read chunks and measure their rows, in a worker process, which unpickles the tokenizer only
    once."""
    if digest not in _templates:
        _templates.clear()
        _templates[digest] = ray.get(template[0])
    made = []
    for job in pickle.loads(row["jobs"]):
        unfit = 0
        try:
            shards = make_shards(job)
            if not shards.broken:
                unfit = measure(Store(job.root), shards, _templates[digest], max_length)
        except PTuningError as error:  # Ray Data would hide it in an error of its own
            shards = Shards(job.name, broken=str(error))
        made.append((shards, unfit))
    return {"made": pickle.dumps(made)}
