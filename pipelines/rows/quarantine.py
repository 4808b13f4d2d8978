"""Quarantined rows: their file, and the errors that too many of them raise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.rows.fits import read_bad
from pipelines.rows.manifest import Entry
from pipelines.rows.notices import BadFile, bad_files
from pipelines.rows.readers import describe
from pipelines.rows.streams import InputFile
from ptuning.errors import DataError
from ptuning.store import Store

QUARANTINE_SCHEMA = pa.schema(
    [
        ("source_file", pa.string()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("user_id", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Quarantine:
    """What is in a quarantine file: rows by reason, by user key, and the worst files."""

    reasons: tuple[tuple[str, int], ...]
    by_user: dict[str, int]
    files: tuple[BadFile, ...]


def write_quarantine(store: Store, folder: str, entries: Sequence[Entry], fit: str) -> Quarantine:
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
    return Quarantine(tuple(reasons.most_common(3)), dict(by_user), files)


def _place_of(entry: Entry) -> tuple[str, int]:
    return entry.file.url, entry.chunk.start if entry.chunk is not None else 0


def find_lost_files(entries: Iterable[Entry]) -> dict[str, int]:
    """The files whose rows were all refused on reading, with the number of rows."""
    bad: Counter[str] = Counter()
    used: set[str] = set()
    for entry in entries:
        bad[entry.file.url] += entry.shards.bad
        if entry.shards.rows or entry.shards.unlearned:
            used.add(entry.file.url)
    return {url: rows for url, rows in sorted(bad.items()) if rows and url not in used}


def check_bad(store: Store, folder: str, entries: Sequence[Entry], fit: str, most: float) -> None:
    """Raise DataError if one of a delivery's files has only bad rows, or if more than a share of
    `most` of all rows are bad. Then the quarantine is written, for people to read."""
    lost = list(find_lost_files(entries))
    read, bad = sum(entry.shards.read for entry in entries), sum(entry.bad for entry in entries)
    if (not lost or most >= 1) and bad <= most * read:
        return
    found = write_quarantine(store, folder, entries, fit)
    quarantine = store.path(f"{folder}/quarantine.parquet")
    if lost and most < 1:
        raise _only_bad(lost, found, {entry.file.url: entry.file for entry in entries}, quarantine)
    raise DataError(
        "too many input rows are bad",
        seen=f"{bad} of {read} rows; most often: {_count_reasons(found.reasons)}; most in "
        + ", ".join(f"{file.file} ({file.rows})" for file in found.files[:3]),
        expected=f"at most data.max_bad_fraction = {most:g} of them",
        fix=f"see {quarantine} for each row's file, number and reason",
        quarantine=quarantine,
    )


def _only_bad(
    lost: Sequence[str], found: Quarantine, files: dict[str, InputFile], quarantine: str
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
