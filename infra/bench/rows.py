"""Measure the partition of rows by user against Polars, DuckDB and Ray Data's map_groups.

    python -m infra.bench.rows --rows 1000000 --users 20000 [--repeats 3] [--only ours polars]

Writes JSONL rows, the same ones each time, and runs each candidate (row_candidates.py) on them in a
process of its own, whose memory and CPU time are watched (watch.py). All must find the same users
and keep the same rows. Prints Markdown tables of the medians, and appends a record of each run to
results/rows.jsonl. `--work DIR` keeps the rows there for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.bench.records import Record, Results, describe_machine
from infra.bench.row_candidates import CANDIDATES, Job, Outcome
from infra.bench.watch import Sample, cpu_between, follow, peaks_between

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "rows.jsonl"
PACKAGES = ("ray", "polars", "duckdb", "pyarrow", "numpy")

FILE_ROWS = 1_400_000  # about 250 MB
MIN_FILES = 4
EPOCH = 1_700_000_000_000  # of the first row, in ms
BATCH_ROWS = 100_000
FRESH_SECONDS = 2.5  # ours reads a file again if it was read right after it was written
BAD_SHARE = 0.001
MORE_SHARE = 0.01  # of the rows and of the users, in the second delivery
WORDS = """
the a of to and in is that for it as was with be by on not he his but at are this have from or had
an they which one you were all her she there would their we him been has when who will no more if
out so up said what its about than into them can only other time new some could these two may first
then do any like my now over such our man me even most made after also did many off before must
well back through years where much your way down should because long each just state those people
"""


# --- the rows ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inputs:
    first: tuple[str, ...]
    more: str


def make_inputs(folder: Path, rows: int, users: int) -> Inputs:
    """The files of both deliveries; made unless they are there."""
    per_file = min(FILE_ROWS, -(-rows // MIN_FILES))
    starts = range(0, rows, per_file)
    first = [folder / f"first-{number}.jsonl" for number in range(len(starts))]
    more = folder / "more.jsonl"
    inputs = Inputs(tuple(map(str, first)), str(more))
    done = folder / "done"
    if done.exists():
        return inputs
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for seed, (path, start) in enumerate(zip(first, starts, strict=True)):
        write_rows(path, start, min(per_file, rows - start), users, 1, seed)
    step = round(1 / MORE_SHARE)
    write_rows(more, rows, -(-rows // step), users, step, len(starts))
    done.touch()
    return inputs


def write_rows(path: Path, start: int, count: int, users: int, step: int, seed: int) -> None:
    """Write rows number `start` and following, of every `step`th user, about 170 bytes each."""
    random = np.random.default_rng(seed)
    phrases = _phrases()
    with path.open("wb") as file:
        for at in range(start, start + count, BATCH_ROWS):
            batch = min(BATCH_ROWS, start + count - at)
            file.write(_lines(random, phrases, at, batch, users, step))


def _phrases() -> pa.Array:
    """4,096 phrases of 4 to 8 words."""
    random, words = np.random.default_rng(0), WORDS.split()
    lengths = random.integers(4, 9, 1 << 12)
    return pa.array(
        [" ".join(words[at] for at in random.integers(0, len(words), n)) for n in lengths]
    )


def _lines(
    random: np.random.Generator, phrases: pa.Array, start: int, count: int, users: int, step: int
) -> memoryview:
    """Rows as JSON lines. Users with low numbers have more rows: half as many at four times the
    number. Times rise, a second per row, but not strictly."""
    numbers = np.int64(random.random(count) ** 2 * -(-users // step)) * step
    ids = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 8, "0")
    times = (
        1_700_000_000_000 + 1000 * (start + np.arange(count)) + random.integers(0, 60_000, count)
    )
    picked = random.integers(0, len(phrases), (3, count))
    texts = [phrases.take(pa.array(at)) for at in picked]
    bad = random.random(count)
    kinds = [
        pa.array((low <= bad / BAD_SHARE) & (bad / BAD_SHARE < high))
        for low, high in ((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1))
    ]
    user = pc.if_else(kinds[0], "", pc.binary_join_element_wise("user-", ids, ""))
    prompt = pc.binary_join_element_wise('"', texts[0], " ", texts[1], '"', "")
    prompt = pc.if_else(kinds[1], "null", prompt)
    completion = pc.if_else(kinds[2], "", texts[2])
    lines = pc.binary_join_element_wise(
        '{"user_id": "',
        user,
        '", "prompt": ',
        prompt,
        ', "completion": "',
        completion,
        '", "timestamp": ',
        pa.array(times).cast(pa.string()),
        "}\n",
        "",
    )
    _, offsets, data = lines.buffers()
    ends = np.frombuffer(offsets, np.int32)
    return memoryview(data)[ends[0] : ends[count]]


# --- one run -------------------------------------------------------------------------------


def measure(name: str, inputs: Inputs, folder: Path, cpus: int) -> Record:
    """Run a candidate in `folder`, which is made for it and removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job = Job(inputs.first, inputs.more, str(folder), cpus)
    job_file = folder / "job.json"
    job_file.write_text(json.dumps(asdict(job)))
    code = "import sys, pathlib; from infra.bench.row_candidates import main; "
    code += "main(sys.argv[1], pathlib.Path(sys.argv[2]))"
    load = os.getloadavg()[0]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, name, str(job_file)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_environment(cpus)},
            cwd=ROOT,
        )
        samples = follow(process)
    if process.returncode:
        tail = (folder / "log").read_text(errors="replace")[-4000:]
        raise SystemExit(f"{name} failed:\n{tail}")
    outcome = Outcome(**json.loads((folder / "outcome.json").read_text()))
    record = describe(outcome, samples) | {"candidate": name, "load": round(load, 2)}
    record["output"] = count_output(Path(outcome.output))
    found = {key: record["output"][key] for key in ("users", "rows") if key in outcome.counts}
    if any(outcome.counts[key] != count for key, count in found.items()):
        raise SystemExit(f"{name} reports {outcome.counts} but wrote {found}")
    shutil.rmtree(folder)
    return record


def _environment(cpus: int) -> dict[str, str]:
    return {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "POLARS_MAX_THREADS": str(cpus),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def describe(outcome: Outcome, samples: Sequence[Sample]) -> Record:
    """Seconds and CPU seconds of each part, and the peaks of memory while the candidate worked
    (without what only measures the tokenising)."""
    spans = outcome.spans
    seconds = {part: end - start for part, (start, end) in spans.items()}
    cpu = {part: cpu_between(samples, start, end) for part, (start, end) in spans.items()}
    for figures in (seconds, cpu):
        figures["first"] = sum(figures[part] for part in outcome.work)
    measured = [span for part, span in spans.items() if part != "tokenise"]
    start, end = min(one for one, _ in measured), max(one for _, one in measured)
    largest, total = peaks_between(samples, start, end)
    return {
        "seconds": {part: round(value, 3) for part, value in seconds.items()},
        "cpu": {part: round(value, 3) for part, value in cpu.items()},
        "memory": {"largest": largest, "all": total},
        "counts": outcome.counts,
    }


def count_output(folder: Path) -> dict[str, int]:
    """Count the rows in a folder's Parquet files: users, rows, valid rows, and the sum of all
    times, which shows whether the same rows were kept. Raises ValueError if a user's rows are not
    together, oldest first."""
    users = rows = valid = times = 0
    for path in sorted(folder.glob("*.parquet")):
        columns = ["user_key", "timestamp", "split"]
        table = pq.read_table(path, columns=columns)
        if not table.num_rows:
            continue
        keys = table["user_key"].combine_chunks().dictionary_encode()
        stamps, user = table["timestamp"].to_numpy(), keys.indices.to_numpy()
        same = user[1:] == user[:-1]
        if (~same).sum() + 1 != len(keys.dictionary) or (same & (np.diff(stamps) < 0)).any():
            raise ValueError(f"{path}: a user's rows are not together, oldest first")
        users, rows = users + len(keys.dictionary), rows + table.num_rows
        valid += pc.sum(pc.equal(table["split"], "valid")).as_py()
        times += int(stamps.sum())
    return {"users": users, "rows": rows, "valid": valid, "times": times}


def check_agreement(records: Sequence[Record]) -> str:
    """What all candidates found, as a sentence. Raises ValueError if they differ."""
    found = {json.dumps(record["output"]): record["candidate"] for record in records}
    if len(found) > 1:
        raise ValueError(f"the candidates differ: {found}")
    counts = records[0]["output"]
    return (
        f"All agree: {counts['users']:,} users, {counts['rows']:,} rows kept, "
        f"{counts['valid']:,} of them valid."
    )


# --- tables --------------------------------------------------------------------------------

KINDS = ("seconds", "cpu")


def format_tables(records: Sequence[Record]) -> str:
    """Markdown: the candidates, the parts of ours, and on what they were measured."""
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record["candidate"], []).append(record)
    head = ["candidate", "seconds", "CPU s", "largest process MB", "all processes MB"]
    head += ["seconds to Polars", "CPU s to Polars"]
    lines = _table(head, _candidate_lines(by_name))
    if "ours" in by_name:
        lines += ["", *_table(["part of ours", "seconds", "CPU s"], _part_lines(by_name["ours"]))]
    return "\n".join([*lines, "", *_footer(records), ""])


def _candidate_lines(by_name: dict[str, list[Record]]) -> Iterator[list[str]]:
    base = [_median(by_name.get("polars", []), kind, "first") for kind in KINDS]
    for name, runs in by_name.items():
        memory = [f"{_median(runs, 'memory', of) / 1e6:,.0f}" for of in ("largest", "all")]
        whole = [_median(runs, kind, "first") for kind in KINDS]
        figures = {name: whole}
        if name == "ours":
            tokenise = [_median(runs, kind, "tokenise") for kind in KINDS]
            without = [all_ - less for all_, less in zip(whole, tokenise, strict=True)]
            figures = {"ours, without tokenising": without, "ours": whole}
        for label, values in figures.items():
            ratios = [f"{a / b:.1f}" if b else "-" for a, b in zip(values, base, strict=True)]
            yield [label, *(f"{value:.1f}" for value in values), *memory, *ratios]


def _part_lines(runs: Sequence[Record]) -> Iterator[list[str]]:
    """The parts of the first delivery, then the second delivery."""

    def figures(*parts: str) -> list[float]:
        return [sum(_median(runs, kind, part) for part in parts) for kind in KINDS]

    def line(label: str, values: Sequence[float]) -> list[str]:
        return [label, *(f"{value:.1f}" for value in values)]

    tokenise, read = figures("tokenise"), figures("read")
    yield line("inspect: digests and chunks", figures("inspect"))
    yield line("read: checks, keys, shards", [a - b for a, b in zip(read, tokenise, strict=True)])
    yield line("tokenise", tokenise)
    yield line("index", figures("index"))
    yield line("quarantine and commit", figures("commit"))
    yield line("gather all users", figures("gather"))
    second, first = figures("second partition", "second gather"), figures("first")
    yield line("second delivery, partition", figures("second partition"))
    yield line("second delivery, gather changed users", figures("second gather"))
    shares = [f"{100 * a / b:.1f} %" for a, b in zip(second, first, strict=True)]
    yield ["second delivery, share of the first", *shares]


def _median(runs: Sequence[Record], kind: str, part: str) -> float:
    return float(median(run[kind][part] for run in runs)) if runs else 0.0


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return [f"| {' | '.join(row)} |" for row in rows]


def _footer(records: Sequence[Record]) -> list[str]:
    one = records[0]
    named = ", ".join(f"{name} {number}" for name, number in one["versions"].items())
    loads = [record["load"] for record in records]
    return [
        check_agreement(records),
        f"{one['rows']:,} rows of {one['users']:,} users; medians of {one['repeats']} repetitions. "
        "Largest process: RSS. All processes: PSS, so shared memory counts once.",
        f"Measured on {one['machine']['cpu']}, {one['machine']['threads']} cores "
        f"(load before a run: {min(loads):.1f} to {max(loads):.1f}), {named}.",
    ]


# --- command line --------------------------------------------------------------------------


def run(
    folder: Path, rows: int, users: int, names: Sequence[str], repeats: int, cpus: int
) -> Iterator[Record]:
    """Measure the candidates in turn, `repeats` times; yields a record of each run."""
    print("making the rows", flush=True)
    inputs = make_inputs(folder / f"{rows}-{users}", rows, users)
    time.sleep(FRESH_SECONDS)
    for number in range(repeats):
        for name in names:
            record: Record = {"rows": rows, "users": users, "repeats": repeats, "repeat": number}
            record |= measure(name, inputs, folder / "run", cpus)
            record["machine"] = describe_machine(cpus)
            record["versions"] = {package: version(package) for package in PACKAGES}
            first, memory = record["seconds"]["first"], record["memory"]["all"] / 1e6
            print(f"{name}: {first:.1f} s, {memory:,.0f} MB", flush=True)
            yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, help="folder for the rows, which are kept there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="results file (JSON lines)")
    options = parser.parse_args()
    results = Results(options.results)
    with tempfile.TemporaryDirectory() as name:
        folder = (options.work or Path(name)).resolve()
        sizes = options.rows, options.users
        records = []
        for record in run(folder, *sizes, options.only, options.repeats, options.cpus):
            results.append(record)
            records.append(record)
    results.close()
    print(format_tables(records), end="")


if __name__ == "__main__":
    main()
