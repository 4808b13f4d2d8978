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
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from ray import cloudpickle

from pipelines.rows.fits import fit_name, measure, read_bad
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
from pipelines.rows.notices import BadFile, bad_files, make_notices
from pipelines.rows.ray_tasks import Progress, cpus, quiet_ray_data, run_all
from pipelines.rows.readers import describe
from pipelines.rows.shards import (
    ChunkJob,
    Shards,
    UserKeys,
    chunk_name,
    count_notes,
    make_shards,
    read_keys,
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
from ptuning.data.encode import Template
from ptuning.data.examples import DataConfig
from ptuning.errors import DataError, PTuningError, RunError
from ptuning.store import Store

FORMAT = 3  # of everything below partitions/; part of the id
_GROUP_BYTES, _GROUP_FILES = 64 << 20, 500  # small files that share a task
_JOB_USERS = 20_000  # changed users per indexing task
QUARANTINE_SCHEMA = pa.schema(
    [
        ("source_file", pa.string()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("user_id", pa.string()),
    ]
)


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
    shards = _Shared([entry.shards for entry in entries if entry.shards.rows])
    files = cut_users(users)
    jobs = [
        GatherJob(store.root, file_name(folder, number), part.rules, keys)
        for number, keys in enumerate(files)
    ]
    tasks = [partial(_with_shards, gather_rows, job, shards) for job in jobs]
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
        parts = [list(part) for part in _split(old.buckets, 2 * cpus())]
        tasks = [partial(count_shrunk, self.store.root, part, now.buckets) for part in parts]
        return sum(run_all(tasks, "compare", self._report))

    def _inspect(self, known: dict[str, Inspected]) -> list[Inspected]:
        """The listed files. Only those are opened whose stamp is not known, or may be out of
        date."""
        found: dict[str, Inspected] = {}
        new = []
        for file in self.listing.files:
            item = known.get(file.url)
            if (
                item is None
                or not file.stamp
                or item.file.is_fresh
                or item.file.stamp != file.stamp
            ):
                new.append(file)
            else:
                found[file.url] = item
        tasks = [
            partial(_inspect_files, group, self.sizes.chunk_bytes)
            for group in _groups(new, lambda file: file.size)
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
        self._check_delivered(folder, chunks)
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
        bad = _write_quarantine(self.store, folder, chunks, self.rules.fit)
        counts = count_notes([entry.shards for entry in chunks])
        counts += self._lost_users(bad, part) + Counter(dict(_lost_files(chunks)))
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
        groups = _groups(jobs, lambda job: job.chunk.size)
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

    # --- bad rows ---------------------------------------------------------------------------

    def _check_delivered(self, folder: str, entries: Sequence[Entry]) -> None:
        """Raise DataError if, among the files of this delivery, one has only bad rows, or too many
        rows are bad."""
        here = {file.url for file in self.listing.files}
        mine = [entry for entry in entries if entry.file.url in here]
        lost = [url for (_, url), _ in _lost_files(mine)]
        read, bad = sum(entry.shards.read for entry in mine), sum(entry.bad for entry in mine)
        most = self.config.max_bad_fraction
        if (not lost or most >= 1) and bad <= most * read:
            return
        found = _write_quarantine(self.store, folder, mine, self.rules.fit)
        quarantine = self.store.path(f"{folder}/quarantine.parquet")
        if lost and most < 1:
            raise _only_bad(lost, found, {entry.file.url: entry.file for entry in mine}, quarantine)
        raise DataError(
            "too many input rows are bad",
            seen=f"{bad} of {read} rows; most often: {_count_reasons(found.reasons)}; most in "
            + ", ".join(f"{file.file} ({file.rows})" for file in found.files[:3]),
            expected=f"at most data.max_bad_fraction = {most:g} of them",
            fix=f"see {quarantine} for each row's file, number and reason",
            quarantine=quarantine,
        )

    def _lost_users(self, bad: _Quarantine, part: Partition) -> Counter[tuple[str, str]]:
        """The number of quarantined rows of each user, by key, who has no other rows."""
        lost = dict(bad.by_user)
        for table in iterate_index(self.store, part.buckets) if lost else ():
            for key in table["user_key"].to_pylist():
                lost.pop(key, None)
        return Counter({("lost_user", key): count for key, count in lost.items()})

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
            for group in _split(touched, max(2 * cpus(), len(keys) // _JOB_USERS))
        ]
        return sorted([*done, *self._run_index(jobs, good)], key=lambda bucket: bucket.first)

    def _run_index(self, jobs: Sequence[IndexJob], good: list[Shards]) -> list[Bucket]:
        shards = _Shared(good)
        tasks = [partial(_with_shards, index_buckets, job, shards) for job in jobs]
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
        groups = _groups(list(found.values()), lambda made: made.rows * 64)
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


# --- quarantine ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Quarantine:
    """What is in a quarantine file: rows by reason, by user key, and the worst files."""

    reasons: tuple[tuple[str, int], ...]
    by_user: dict[str, int]
    files: tuple[BadFile, ...]


def _write_quarantine(store: Store, folder: str, entries: Sequence[Entry], fit: str) -> _Quarantine:
    """Write the quarantined rows of all chunks, by file and row number."""
    reasons: Counter[str] = Counter()
    by_file: Counter[tuple[str, str]] = Counter()
    by_user: Counter[str] = Counter()
    with (
        store.open_write(f"{folder}/quarantine.parquet") as file,
        pq.ParquetWriter(file, QUARANTINE_SCHEMA, compression="zstd") as writer,
    ):
        for entry in sorted(entries, key=_place_of):
            if not entry.bad or entry.chunk is None:
                continue
            bad = read_bad(store, entry.shards, fit, entry.unfit)
            url = entry.file.url.encode("utf-8", "backslashreplace").decode("utf-8")
            numbers = pc.add(bad["number"], entry.chunk.first_row)
            sources = pa.array([url] * bad.num_rows, pa.string())
            columns = [sources, numbers, bad["reason"], bad["user_id"]]
            writer.write_table(pa.table(columns, schema=QUARANTINE_SCHEMA))
            for found in pc.value_counts(bad["reason"]).to_pylist():
                reasons[found["values"]] += found["counts"]
                by_file[url, found["values"]] += found["counts"]
            for found in pc.value_counts(bad["user_key"].drop_null()).to_pylist():
                by_user[found["values"]] += found["counts"]
    files = bad_files(by_file)
    return _Quarantine(tuple(reasons.most_common(3)), dict(by_user), files)


def _place_of(entry: Entry) -> tuple[str, int]:
    return entry.file.url, entry.chunk.start if entry.chunk is not None else 0


def _lost_files(entries: Iterable[Entry]) -> list[tuple[tuple[str, str], int]]:
    """The files whose rows were all refused on reading, as notices with the number of rows."""
    bad: Counter[str] = Counter()
    used: set[str] = set()
    for entry in entries:
        bad[entry.file.url] += entry.shards.bad
        if entry.shards.rows or entry.shards.unlearned:
            used.add(entry.file.url)
    lost = [(url, n) for url, n in sorted(bad.items()) if n and url not in used]
    return [(("lost_file", url), n) for url, n in lost]


def _only_bad(
    lost: Sequence[str], found: _Quarantine, files: dict[str, InputFile], quarantine: str
) -> DataError:
    by_name = {one.file: one for one in found.files}
    first = next((url for url in lost if url in by_name), lost[0])
    reasons = by_name[first].reasons if first in by_name else found.reasons
    details = [f"{first}: {_count_reasons(reasons)}"]
    if columns := describe(files[first]):
        details.append(columns)
    if len(lost) > 1:
        details.append(f"so are {len(lost) - 1} more files")
    return DataError(
        "every row of an input file is bad",
        seen="; ".join(details),
        expected="columns user_id, prompt and completion, or user_id and messages",
        fix="repair or omit the file; if its columns have other names, set "
        "data.columns.user_id=NAME etc.; data.max_bad_fraction=1 continues without the file",
        quarantine=quarantine,
        files=len(lost),
    )


def _count_reasons(reasons: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{reason} ({count})" for reason, count in reasons)


# --- tasks ---------------------------------------------------------------------------------


def _groups(items: Sequence[Any], size: Callable[[Any], int]) -> list[list[Any]]:
    """Group consecutive items, so that small ones share a task."""
    groups: list[list[Any]] = []
    filled = 0
    for item in items:
        if not groups or filled + size(item) > _GROUP_BYTES or len(groups[-1]) >= _GROUP_FILES:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size(item)
    return groups


def _split(items: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """Cut items into at most `parts` groups of about equal length, in order."""
    size = -(-len(items) // max(parts, 1)) or 1
    return [items[start : start + size] for start in range(0, len(items), size)]


def _between(keys: Sequence[str], first: str, end: str) -> list[str]:
    return list(keys[bisect_left(keys, first) : bisect_left(keys, end)])


def _any_between(keys: Sequence[str], first: str, end: str) -> bool:
    at = bisect_left(keys, first)
    return at < len(keys) and keys[at] < end


def _is_known(before: InputFile, now: InputFile) -> bool:
    """Whether a file is surely as it was when it was inspected."""
    return bool(now.stamp) and now.stamp == before.stamp and not before.is_fresh


def _inspect_files(files: list[InputFile], chunk_bytes: int) -> list[Inspected]:
    return [inspect(file, chunk_bytes) for file in files]


def _read_group_keys(root: str, group: Sequence[Shards]) -> pa.Array:
    arrays = [read_keys(Store(root), made) for made in group]
    return pc.unique(pa.chunked_array(arrays, pa.string()))


class _Shared:
    """Shards that many tasks need, sent to each node once."""

    def __init__(self, shards: list[Shards]) -> None:
        # In a list, because Ray would otherwise fetch it for each task.
        self._reference = [ray.put(shards)]

    def get(self) -> list[Shards]:
        found: list[Shards] = ray.get(cast(Any, self._reference[0]))
        return found


def _with_shards(function: Callable[..., Any], job: Any, shards: _Shared) -> Any:
    return function(job, shards.get())


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
