"""Each row is with its user once, or in quarantine, whatever the layout; without Ray.

The index of a changed delivery is the one that a fresh store would have.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_rows import KEYS, expected_users, make_rows, write_jsonl
from tiny_model import make_tokenizer

from pipelines.rows import readers
from pipelines.rows.fits import fit_name, measure, read_bad
from pipelines.rows.gather import GatherJob, commit_rows, cut_users, gather_rows, read_users
from pipelines.rows.index import (
    Bucket,
    IndexJob,
    IndexRules,
    bucket_ranges,
    count_shrunk,
    index_buckets,
    read_index_files,
)
from pipelines.rows.inputs import find_files, inspect
from pipelines.rows.shards import ChunkJob, Shards, chunk_name, make_shards, read_record
from pipelines.rows.wanted import Wanted, read_keys
from ptuning.data.columns import ColumnNames
from ptuning.data.encode import Template
from ptuning.data.examples import data_digest
from ptuning.store import Store

TEMPLATE = Template.of(make_tokenizer())
RULES = IndexRules(fit_name(TEMPLATE.digest, 512), None, 8)
Rows = list[dict[str, Any]]


def _read(store: Store, folder: Path, chunk_bytes: int, shard_bytes: int) -> list[Shards]:
    """The shards of all files below a folder."""
    made = []
    for file in find_files([str(folder)]).files:
        item = inspect(file, chunk_bytes)
        for chunk in item.chunks:
            name = chunk_name(chunk, item.file, ColumnNames(), KEYS)
            job = ChunkJob(store.root, name, item.file, chunk, ColumnNames(), KEYS, shard_bytes)
            made.append(make_shards(job))
    return made


def _unfit(store: Store, shards: list[Shards]) -> list[int]:
    return [measure(store, made, TEMPLATE, 512) for made in shards]


def _index(store: Store, shards: list[Shards], bucket_rows: int = 10**6) -> list[Bucket]:
    ranges = bucket_ranges(sum(made.rows for made in shards), bucket_rows)
    jobs = [IndexJob(store.root, (bounds,), RULES) for bounds in ranges]
    return [bucket for job in jobs for bucket in index_buckets(job, shards)]


_BAD: list[dict[str, Any]] = [
    {"prompt": "p", "completion": "c"},
    {"user_id": "u0", "prompt": "p"},
    {"user_id": "u0", "prompt": "p", "completion": "x" * 600},
]
_ROW = st.integers(0, 11).map(
    lambda n: _BAD[n] if n < 3 else {"user_id": f"u{n % 4}", "prompt": "p", "completion": f"c{n}"}
)


@settings(max_examples=40)
@given(
    st.lists(st.lists(_ROW, max_size=30), min_size=1, max_size=4),
    st.integers(20, 400),
    st.integers(50, 1000),
    st.integers(1, 40),
    st.integers(1, 50),
)
def test_each_row_is_in_one_users_partition_or_in_quarantine(
    files: list[Rows], chunk_bytes: int, shard_bytes: int, bucket_rows: int, file_rows: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, rows in enumerate(files):
            write_jsonl(Path(folder) / "in" / f"{number}.jsonl", rows)
        store = Store(f"{folder}/store")
        shards = _read(store, Path(folder) / "in", chunk_bytes, shard_bytes)
        unfit = _unfit(store, shards)
        good = [row for rows in files for row in rows if row not in _BAD]
        assert sum(made.read for made in shards) == sum(map(len, files))
        assert sum(made.bad for made in shards) + sum(unfit) == sum(map(len, files)) - len(good)
        bad = [
            read_bad(store, made, RULES.fit, count)
            for made, count in zip(shards, unfit, strict=True)
        ]
        assert sum(table.num_rows for table in bad) == sum(map(len, files)) - len(good)

        buckets = _index(store, shards, bucket_rows)
        index = read_index_files(store, buckets).to_pylist()
        expected = expected_users(good)
        assert {row["user_id"]: row["data_digest"] for row in index} == {
            user: data_digest(examples) for user, examples in expected.items()
        }
        assert sum(bucket.rows for bucket in buckets) == len(good)
        users = [(row["user_key"], row["rows"]) for row in index]
        assert users == sorted(users)
        cut = cut_users(users, file_rows)
        for number, keys in enumerate(cut):
            gather_rows(GatherJob(store.root, f"rows/rows-{number}.parquet", RULES, keys), shards)
        commit_rows(store, "rows", cut)
        found = read_users(store, "rows", [key for key, _ in users])
        assert found == {KEYS.user_key(user): rows for user, rows in expected.items()}


_EDIT = st.tuples(st.integers(0, 2), st.lists(_ROW, max_size=12))  # a file, and its new rows


@settings(max_examples=12)
@given(st.lists(_EDIT, min_size=2, max_size=5), st.integers(50, 300))
def test_an_index_that_is_brought_up_to_date_is_a_fresh_one(
    edits: list[tuple[int, Rows]], chunk_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, source = Store(f"{folder}/store"), Path(folder) / "in"
        write_jsonl(source / "always.jsonl", make_rows(["u0", "u9"], each=8))
        before: list[Shards] = []
        buckets: list[Bucket] = []
        for number, rows in edits:
            write_jsonl(source / f"{number}.jsonl", rows)
            now = _read(store, source, chunk_bytes, 10**6)
            _unfit(store, now)
            buckets = _update(store, before, now, buckets) if buckets else _index(store, now)
            fresh = _index(store, now, 10)
            assert read_index_files(store, buckets) == read_index_files(store, fresh)
            before = now


def _update(
    store: Store, before: list[Shards], now: list[Shards], buckets: list[Bucket]
) -> list[Bucket]:
    """The index by the users in chunks that came or went; the buckets become more."""
    names = Counter(made.name for made in now)
    names.subtract(made.name for made in before)
    moved = {made.name: made for made in (*now, *before) if names[made.name] and made.rows}
    keys = sorted({key for made in moved.values() for key in read_keys(store, made).to_pylist()})
    old = read_index_files(store, buckets).to_pylist()
    job = IndexJob(store.root, tuple(bucket_ranges(100, 30)), RULES, keys, tuple(buckets))
    found = index_buckets(job, now)
    new = {row["user_key"]: row["usable"] for row in read_index_files(store, found).to_pylist()}
    shrunk = sum(new.get(row["user_key"], 0) < row["usable"] for row in old)
    assert count_shrunk(store.root, buckets, found) == shrunk
    return found


_VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        "",
        "x",
        "é",
        "\ud800",
        "train",
        "dev",
        "12",
        0,
        7,
        True,
        1.5,
        1e30,
        2**70,
        [],
        {},
        ["train"],
    ]
)
_ANY_ROW = st.dictionaries(
    st.sampled_from(["user_id", "prompt", "completion", "timestamp", "split", "weight", "mood"]),
    _VALUES,
)


@given(st.lists(_ANY_ROW, max_size=8))
def test_plain_rows_are_read_as_the_check_of_every_row_reads_them(rows: Rows) -> None:
    """The shortcut is an optimisation of `check_row`, and so is orjson of `json`."""
    found = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        write_jsonl(Path(folder) / "in" / "a.jsonl", rows)
        for name in ("fast", "slow"):
            store = Store(f"{folder}/{name}")
            shards = _read(store, Path(folder) / "in", 10**6, 10**6)
            tables = [
                pq.read_table(store.path(f"{made.name}/{part}.parquet")).to_pylist()
                for made in shards
                for part in (["shard-0"] if made.rows else []) + (["bad"] if made.bad else [])
            ]
            found.append(
                (tables, [replace(made, notes=tuple(sorted(made.notes))) for made in shards])
            )
            patch.setattr("pipelines.rows.shards._Rows._add_plain", lambda *_: False)
            patch.setattr("pipelines.rows.readers._parse_json", readers._parse_slowly)
    assert found[0] == found[1]


def test_a_grown_file_has_new_contents_in_its_last_chunk_only(tmp_path: Path) -> None:
    store, rows = Store(tmp_path / "store"), make_rows(["a", "b"], each=50)
    write_jsonl(tmp_path / "in" / "a.jsonl", rows)
    first = _read(store, tmp_path / "in", 1000, 10**6)
    write_jsonl(tmp_path / "in" / "a.jsonl", [*rows, *make_rows(["c"], each=1)])
    second = _read(store, tmp_path / "in", 1000, 10**6)
    assert len(first) > 5
    assert [made.name for made in second[:-1]] == [made.name for made in first[: len(second) - 1]]
    assert second[-1].name not in {made.name for made in first}


def test_a_chunk_is_read_once_and_a_half_written_one_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    write_jsonl(tmp_path / "in" / "a.jsonl", make_rows(["a"], each=9))
    (made,) = _read(store, tmp_path / "in", 10**6, 100)
    assert made.shards > 1
    shard = Path(store.path(f"{made.name}/shard-0.parquet"))
    stamp = shard.stat().st_mtime_ns
    assert _read(store, tmp_path / "in", 10**6, 100) == [made]
    assert shard.stat().st_mtime_ns == stamp
    store.remove(f"{made.name}/shards.json")
    shard.write_bytes(b"half")
    assert read_record(store, made.name) is None
    assert _read(store, tmp_path / "in", 10**6, 100) == [made]
    assert read_keys(store, made).to_pylist() == [KEYS.user_key("a")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_a_file_that_changes_before_it_is_read_is_refused(tmp_path: Path, name: str) -> None:
    """Also if its size and time are the same: a chunk is kept for ever under its digest."""
    texts = {
        user: "user_id,prompt,completion\n" + f"{user},p,c\n" * 9
        if name.endswith("csv")
        else "".join(json.dumps(row) + "\n" for row in make_rows([user], each=9))
        for user in ("a", "b")
    }
    path = tmp_path / name

    def write(user: str) -> None:
        data = texts[user].encode()
        path.write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
        os.utime(path, (10**9, 10**9))

    write("a")
    item = inspect(find_files([str(path)]).files[0])
    write("b")
    folder = chunk_name(item.chunks[0], item.file, ColumnNames(), KEYS)
    store = Store(tmp_path / "store")
    job = ChunkJob(store.root, folder, item.file, item.chunks[0], ColumnNames(), KEYS)
    assert make_shards(job).broken
    assert read_record(store, folder) is None
    write("a")
    assert read_keys(store, make_shards(job)).to_pylist() == [KEYS.user_key("a")]


def test_a_parquet_file_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(make_rows(["a"], each=9)), path)
    item = inspect(find_files([str(path)]).files[0])
    pq.write_table(pa.Table.from_pylist(make_rows(["b"], each=9)), path)
    os.utime(path, (10**9, 10**9))
    folder = chunk_name(item.chunks[0], item.file, ColumnNames(), KEYS)
    job = ChunkJob(str(tmp_path), folder, item.file, item.chunks[0], ColumnNames(), KEYS)
    assert "changed while it was read" in make_shards(job).broken


def test_a_change_within_the_clocks_step_is_not_missed(tmp_path: Path) -> None:
    """A file that was written just now is not known by its stamp the next time."""
    path = write_jsonl(tmp_path / "a.jsonl", make_rows(["a"]))
    assert inspect(find_files([str(path)]).files[0]).file.is_fresh
    os.utime(path, (10**9, 10**9))
    assert not inspect(find_files([str(path)]).files[0]).file.is_fresh


def test_buckets_are_ranges_of_keys_and_only_ever_cut_in_two() -> None:
    keys = sorted(KEYS.user_key(f"u{n}") for n in range(3000))
    sizes = {}
    for rows in (1, 11, 21, 41, 300):
        ranges = bucket_ranges(rows, 10)
        assert (ranges[0][0], ranges[-1][1]) == ("", "~")
        assert [end for _, end in ranges[:-1]] == [first for first, _ in ranges[1:]]
        counts = [sum(first <= key < end for key in keys) for first, end in ranges]
        assert sum(counts) == len(keys)
        assert max(counts) < 1.5 * len(keys) / len(counts)
        sizes[rows] = {first for first, _ in ranges}
    assert [len(firsts) for firsts in sizes.values()] == [1, 2, 4, 8, 32]
    assert sizes[1] <= sizes[11] <= sizes[21] <= sizes[41] <= sizes[300]


def test_only_the_row_groups_of_wanted_users_are_read() -> None:
    wanted = Wanted("b", "y", keys=["c", "m"])
    assert wanted.may_have("a", "c")
    assert wanted.may_have("d", "z")
    assert not wanted.may_have("d", "l")
    assert not wanted.may_have("n", "z")
    assert not wanted.may_have("y", "z")
    assert Wanted("b", "c").may_have("a", "b")
    assert not Wanted("b", "c").may_have("c", "d")


def test_users_are_cut_into_files_by_rows() -> None:
    users = [("a", 5), ("b", 5), ("c", 11), ("d", 1)]
    assert cut_users(users, 10) == [["a", "b"], ["c"], ["d"]]
    assert cut_users([], 10) == []
