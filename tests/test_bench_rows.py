"""The rows benchmark: its rows, its tables, and that all its candidates do the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.bench import rows
from infra.bench.row_candidates import CANDIDATES, MAX_ROWS, choose_group
from infra.bench.watch import Sample, cpu_between, peaks_between
from ptuning.data.examples import arrange
from ptuning.types import Example

PARTS = ("inspect", "read", "index", "commit", "gather", "second partition", "second gather")


def record_of(name: str, seconds: float, **changes: Any) -> dict[str, Any]:
    figures = dict.fromkeys(PARTS, 1.0) if name == "ours" else {}
    figures |= {"first": seconds, "tokenise": 0.5}
    return {
        "candidate": name,
        "rows": 100,
        "users": 2,
        "repeats": 3,
        "seconds": figures,
        "cpu": figures,
        "memory": {"largest": 10**9, "all": 2 * 10**9},
        "output": {"users": 2, "rows": 80, "valid": 16, "times": 1},
        "load": 0.5,
        "machine": {"cpu": "a cpu", "threads": 2},
        "versions": {"ray": "1"},
        **changes,
    }


def test_rows_are_the_same_each_time_and_of_few_users_in_the_second_delivery(
    tmp_path: Path,
) -> None:
    inputs, again = (rows.make_inputs(tmp_path / name, 4000, 200) for name in ("a", "b"))
    assert len(inputs.first) == rows.MIN_FILES
    lines: list[bytes] = []
    for one, two in zip(inputs.first, again.first, strict=True):
        data = Path(one).read_bytes()
        assert data == Path(two).read_bytes()
        lines += data.splitlines()
    assert len(set(lines)) == 4000
    assert 160 < sum(map(len, lines)) / 4000 < 180
    more = [json.loads(line) for line in Path(inputs.more).read_bytes().splitlines()]
    assert len(more) == 40
    assert {row["user_id"] for row in more if row["user_id"]} == {"user-00000000", "user-00000100"}


def test_rows_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    first = rows.make_inputs(tmp_path / "rows", 400, 20)
    Path(first.more).write_text("")
    assert rows.make_inputs(tmp_path / "rows", 400, 20) == first
    assert Path(first.more).read_text() == ""


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 11, 40, 41, 200])
def test_a_group_keeps_the_rows_that_a_run_keeps(count: int) -> None:
    times = [7 * at % count for at in range(count)] if count % 7 else list(range(count))
    table = choose_group(pa.table({"timestamp": times}))
    expected = arrange(
        [Example(prompt="p", completion="c", timestamp=at) for at in times], MAX_ROWS
    )
    assert table["timestamp"].to_pylist() == [example.timestamp for example in expected]
    assert table["split"].to_pylist() == [example.split for example in expected]


def test_output_in_which_a_user_is_in_two_places_is_refused(tmp_path: Path) -> None:
    table = pa.table({"user_key": ["a", "b", "a"], "timestamp": [1, 2, 3], "split": ["train"] * 3})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="not together"):
        rows.count_output(tmp_path)
    pq.write_table(table.slice(1), tmp_path / "rows.parquet")
    assert rows.count_output(tmp_path) == {"users": 2, "rows": 2, "valid": 0, "times": 5}


def test_candidates_that_differ_are_an_error() -> None:
    other = {"users": 2, "rows": 79, "valid": 16, "times": 1}
    records = [record_of("ours", 9.0), record_of("polars", 2.0, output=other)]
    with pytest.raises(ValueError, match="differ"):
        rows.format_tables(records)


def test_tables_show_medians_and_ratios_to_polars() -> None:
    records = [record_of("ours", seconds) for seconds in (8.5, 4.5, 90.0)]
    text = rows.format_tables([*records, record_of("polars", 2.0)])
    assert "| ours, without tokenising | 8.0 | 8.0 | 1,000 | 2,000 | 4.0 | 4.0 |" in text
    assert "| polars | 2.0 | 2.0 | 1,000 | 2,000 | 1.0 | 1.0 |" in text
    assert "| read: checks, keys, shards | 0.5 | 0.5 |" in text
    assert "| second delivery, share of the first | 23.5 % | 23.5 % |" in text
    assert "All agree: 2 users, 80 rows kept, 16 of them valid." in text


def test_cpu_and_peaks_are_those_between_two_times() -> None:
    samples = [Sample(float(at), 10 * at, 20 * at, 2.0 * at) for at in range(10)]
    assert cpu_between(samples, 1.5, 4.0) == 5.0
    assert peaks_between(samples, 1.5, 4.0) == (40, 80)


@pytest.mark.slow
def test_candidates_find_the_same_users_and_keep_the_same_rows(tmp_path: Path) -> None:
    chosen = ["ours", "polars", "duckdb"]  # the shuffles of Ray Data take half a minute
    assert set(chosen) < set(CANDIDATES)
    records = list(rows.run(tmp_path, 2000, 60, chosen, 1, 2))
    assert [record["candidate"] for record in records] == chosen
    assert rows.check_agreement(records).startswith("All agree: 60 users")
    ours = records[0]
    assert ours["counts"]["read"] == 2000
    assert ours["counts"]["changed"] == 1
    assert all(record["memory"]["all"] > 0 for record in records)
