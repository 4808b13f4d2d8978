"""Partitioning on a real Ray: no user's rows are split, lost, mixed or counted twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from partition_rows import (
    CONFIG,
    HOSTILE,
    KEYS,
    SMALL,
    Keys,
    expected_users,
    make_rows,
    read_all,
    read_index_rows,
    write_jsonl,
)

from pipelines.rows.gather import read_users
from pipelines.rows.partition import Sizes, gather_users, make_partition
from pipelines.rows.stored import Partition, read_index, read_partition
from ptuning.data.encode import Template
from ptuning.data.examples import DataConfig, data_digest
from ptuning.errors import DataError, RunError
from ptuning.store import Store

SNAPSHOT = DataConfig(delivery="snapshot")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.mark.parametrize("sizes", [Sizes(100, 10), Sizes(700, 100), Sizes()])
def test_a_user_scattered_over_all_files_has_all_rows_in_one_place(
    ray_session: None, tmp_path: Path, store: Store, template: Template, sizes: Sizes
) -> None:
    rows = make_rows(["everywhere"], each=60) + make_rows([f"u{n}" for n in range(20)], each=9)
    rows += make_rows(HOSTILE, each=8)
    random.Random(0).shuffle(rows)
    for number in range(60):
        write_jsonl(tmp_path / "in" / f"{number % 7}" / f"{number}.jsonl", rows[number::60])
    made = make_partition([str(tmp_path / "in")], store, CONFIG, template, KEYS, sizes=sizes)

    users = read_all(store, made)
    assert users == expected_users(rows)
    index = read_index_rows(store, made)
    assert [entry["user_id"] for entry in index] == sorted({row["user_id"] for row in rows})
    for entry in index:
        examples = users[entry["user_id"]]
        assert entry["user_key"] == KEYS.user_key(entry["user_id"])
        assert entry["rows"] == len(examples)
        assert entry["data_digest"] == data_digest(examples)
        assert entry["first_at"] == min(example.timestamp or 0 for example in examples)
        assert entry["last_at"] == max(example.timestamp or 0 for example in examples)
        tokens = [template.encode(example).supervised for example in examples]
        assert entry["supervised_tokens"] == sum(tokens)
    assert (made.rows_read, made.rows_kept, made.rows_quarantined) == (len(rows), len(rows), 0)
    assert (made.users, made.too_few) == (len(index), 0)


def test_gathered_rows_are_sorted_by_user_then_time_and_a_pack_reads_its_own_only(
    ray_session: None, tmp_path: Path, store: Store, template: Template
) -> None:
    rows = make_rows([f"u{n}" for n in range(30)], each=8)
    random.Random(1).shuffle(rows)
    source = str(write_jsonl(tmp_path / "a.jsonl", rows))
    made = make_partition([source], store, CONFIG, template, KEYS, sizes=SMALL)
    assert len(made.buckets) == 16  # 240 rows, at most 20 of them in each
    keys = sorted(KEYS.user_key(f"u{n}") for n in range(30))
    gather_users(store, made, [(key, 40_000) for key in keys], "rows")
    assert len(store.list("rows")) == 15 + 1
    for number in range(15):
        table = pq.read_table(store.path("rows", f"rows-{number}.parquet")).to_pylist()
        assert {row["user_key"] for row in table} == set(keys[2 * number : 2 * number + 2])
        places = [(row["user_key"], row["timestamp"]) for row in table]
        assert places == sorted(places)
    Path(store.path("rows", "rows-0.parquet")).unlink()
    assert list(read_users(store, "rows", keys[2:5])) == keys[2:5]


def test_order_and_layout_of_files_change_no_digest(
    ray_session: None, tmp_path: Path, template: Template
) -> None:
    rows = make_rows([f"u{n}" for n in range(10)], each=12)
    for row in rows[::3]:
        del row["timestamp"]
    rows += rows[:5]  # duplicates are rows
    indexes = []
    for seed, count in ((1, 1), (2, 9)):
        folder = tmp_path / f"layout{seed}"
        shuffled = random.Random(seed).sample(rows, len(rows))
        for number in range(count):
            write_jsonl(folder / f"{seed}-{number}.jsonl", shuffled[number::count])
        store = Store(tmp_path / f"store{seed}")
        made = make_partition([str(folder)], store, DataConfig(max_rows=10), template, KEYS)
        indexes.append((read_index_rows(store, made), read_all(store, made)))
    assert indexes[0] == indexes[1]


def test_max_rows_keeps_the_newest_and_test_rows_apart(
    ray_session: None, tmp_path: Path, store: Store, template: Template
) -> None:
    rows = make_rows(["plain"], each=100)
    rows += [row | {"split": "test"} for row in make_rows(["tested"], each=20, start=10**12)]
    rows += [row | {"split": "valid"} for row in make_rows(["tested"], each=20)]
    rows += make_rows(["tested"], each=60, start=10**11)
    config = DataConfig(max_rows=40)
    made = make_partition(
        [str(write_jsonl(tmp_path / "a.jsonl", rows))], store, config, template, KEYS
    )
    assert read_all(store, made) == expected_users(rows, max_rows=40)
    counts = {
        entry["user_id"]: (entry["rows_train"], entry["rows_valid"], entry["rows_test"])
        for entry in read_index_rows(store, made)
    }
    assert counts == {"plain": (32, 8, 0), "tested": (32, 8, 8)}
    assert made.rows_kept == 88


def test_max_users_keeps_those_with_most_train_and_valid_rows_ties_by_id(
    ray_session: None, tmp_path: Path, store: Store, template: Template
) -> None:
    rows = make_rows(["few"], each=9) + make_rows(["a", "b", "c"], each=10)
    rows += make_rows(["most"], each=12)
    # Rows that do not count: test rows, and completions that are too long.
    rows += [row | {"split": "test"} for row in make_rows(["few"], each=9, start=10**11)]
    rows += [row | {"completion": "x" * 600} for row in make_rows(["few"], each=3)]
    config = DataConfig(max_users=3, max_bad_fraction=0.2)
    made = make_partition(
        [str(write_jsonl(tmp_path / "a.jsonl", rows))], store, config, template, KEYS
    )
    assert [entry["user_id"] for entry in read_index_rows(store, made)] == ["a", "b", "most"]
    assert set(read_all(store, made)) == {"a", "b", "most"}
    assert (made.rows_read, made.rows_kept, made.rows_quarantined) == (len(rows), 32, 3)


def test_users_with_too_few_rows_are_in_the_index_and_marked(
    ray_session: None, tmp_path: Path, store: Store, template: Template
) -> None:
    rows = make_rows(["seven"], each=7) + make_rows(["eight"], each=8)
    rows += [row | {"split": "train"} for row in make_rows(["unvalidated"], each=20)]
    config = DataConfig(max_rows=4)  # fewer than min_examples: nobody's fault
    made = make_partition(
        [str(write_jsonl(tmp_path / "a.jsonl", rows))], store, config, template, KEYS
    )
    marked = {entry["user_id"]: entry["too_few"] for entry in read_index_rows(store, made)}
    assert marked == {"seven": True, "eight": False, "unvalidated": True}
    assert (made.users, made.too_few) == (3, 2)


def test_too_many_bad_rows_fail_and_leave_the_quarantine_file(
    ray_session: None, tmp_path: Path, store: Store, template: Template
) -> None:
    rows = make_rows(["a"], each=90) + [{"user_id": True}] * 6 + [{}] * 4
    source = str(write_jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(DataError) as caught:
        make_partition([source], store, CONFIG, template, KEYS, sizes=SMALL)
    assert "user_id is not a string but bool (6), user_id is missing (4)" in str(caught.value)
    assert "10 of 100 rows" in str(caught.value)
    file = Path(caught.value.fields["quarantine"])
    assert str(file) in str(caught.value)
    assert pq.read_table(file).num_rows == 10
    assert read_partition(store, file.parent.name) is None
    with pytest.raises(RunError, match="not finished"):
        read_index(store, file.parent.name)
    assert (
        make_partition([source], store, DataConfig(max_bad_fraction=0.1), template, KEYS).users == 1
    )


def texts_of(made: Partition) -> dict[tuple[str, str], tuple[int, str]]:
    return {(one.kind, Path(one.subject).name): (one.count, one.text) for one in made.notices}


def test_a_file_of_bad_rows_alone_fails_and_is_named_with_its_columns(
    ray_session: None, tmp_path: Path, store: Store, template: Template
) -> None:
    for number in range(30):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", make_rows([f"u{number}"]))
    write_jsonl(tmp_path / "in" / "odd.jsonl", [{"name": "bob", "text": "hi"}] * 10)
    with pytest.raises(DataError) as caught:  # 3 % of the rows are bad
        make_partition([str(tmp_path / "in")], store, CONFIG, template, KEYS, sizes=SMALL)
    for part in (
        "odd.jsonl: user_id is missing (10)",
        "columns are 'name', 'text'",
        "user_id=NAME",
    ):
        assert part in str(caught.value)
    assert pq.read_table(caught.value.fields["quarantine"]).num_rows == 10
    config = DataConfig(max_bad_fraction=1)
    made = make_partition([str(tmp_path / "in")], store, config, template, KEYS)
    assert made.users == 30
    assert texts_of(made)["lost_file", "odd.jsonl"][0] == 10
    assert [(Path(bad.file).name, bad.rows, bad.reasons) for bad in made.bad_files] == [
        ("odd.jsonl", 10, (("user_id is missing", 10),))
    ]


@pytest.mark.parametrize("max_users", [None, 1])
def test_a_user_without_a_usable_row_is_named(
    ray_session: None, tmp_path: Path, store: Store, template: Template, max_users: int | None
) -> None:
    rows = make_rows(["ann"], each=70) + make_rows(["cy"], each=9)
    turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "thanks"}]
    rows += [{"user_id": "bob", "messages": turns}] * 3  # refused on reading
    rows += [row | {"completion": "x" * 600} for row in make_rows(["dan"], each=2)]  # too long
    rows += [{"user_id": "cy", "prompt": "q"}]
    config = DataConfig(max_bad_fraction=0.1, max_users=max_users)
    source = str(write_jsonl(tmp_path / "a.jsonl", rows))
    made = make_partition([source], store, config, template, KEYS)
    lost = {key: count for (kind, key), (count, _) in texts_of(made).items() if kind == "lost_user"}
    assert lost == {KEYS.user_key("bob"): 3, KEYS.user_key("dan"): 2}
    table = pq.read_table(store.path("partitions", made.partition_id, "quarantine.parquet"))
    assert sorted(table["user_id"].to_pylist()) == ["bob"] * 3 + ["cy"] + ["dan"] * 2


def test_files_that_are_not_read_are_named_each_time(
    ray_session: None, tmp_path: Path, store: Store, template: Template
) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", make_rows(["ann"]))
    made = make_partition([str(tmp_path / "in")], store, CONFIG, template, KEYS, sizes=SMALL)
    assert made.notices == ()
    for number in range(30):
        write_jsonl(tmp_path / "in" / f"{number:02}.xlsx", [])
    again = make_partition([str(tmp_path / "in")], store, CONFIG, template, KEYS, sizes=SMALL)
    assert again.partition_id == made.partition_id
    assert len(again.notices) == 21
    assert again.notices[0].subject == str(tmp_path / "in" / "00.xlsx")
    assert "was not read" in again.notices[0].text
    assert again.notices[-1].text == "10 more files were not read"


def test_unexpected_interpretations_of_rows_are_reported(
    ray_session: None, tmp_path: Path, store: Store, template: Template
) -> None:
    rows = [
        row | {"user_id": 7, "weight": n % 5, "mood": 1} for n, row in enumerate(make_rows("a"))
    ]
    rows = [row | {"weight": min(row["weight"], 1), "split": "dev"} for row in rows]
    source = str(write_jsonl(tmp_path / "a.jsonl", rows))
    made = make_partition([source], store, CONFIG, template, KEYS, sizes=SMALL)
    assert (made.rows_read, made.rows_kept, made.rows_quarantined) == (10, 8, 0)
    assert [(one.kind, one.subject, one.count) for one in made.notices] == [
        ("unknown_column", "mood", 10),
        ("weight_zero", "", 2),
        ("number_id", "int", 10),
        ("split_name", "dev as valid", 10),
    ]
    assert read_partition(store, made.partition_id) == made


def test_a_partition_depends_on_folders_rules_and_the_stores_keys(
    ray_session: None,
    tmp_path: Path,
    store: Store,
    template: Template,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = make_rows(["a", "b"])
    first = write_jsonl(tmp_path / "split=train" / "a.jsonl", rows)
    moved = write_jsonl(tmp_path / "day=2" / "split=train" / "a.jsonl", rows)
    other = write_jsonl(tmp_path / "split=test" / "a.jsonl", rows)

    def partition(source: Path, keys: Keys = KEYS) -> Partition:
        return make_partition([str(source)], store, SNAPSHOT, template, keys)

    made = partition(first)
    assert made.too_few == 2
    assert partition(moved) == made
    ids = [
        made.partition_id,
        partition(other).partition_id,
        partition(first, Keys(b"other")).partition_id,
    ]
    monkeypatch.setattr("pipelines.rows.shards.ROW_RULES", 99)
    ids.append(partition(first).partition_id)
    assert len(set(ids)) == 4


def test_too_many_rows_that_do_not_fit_fail_too(
    ray_session: None, tmp_path: Path, store: Store, template: Template
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_rows(["a"], each=10))
    with pytest.raises(DataError, match="10 of 10 rows"):
        make_partition([str(source)], store, DataConfig(max_length=8), template, KEYS)
    assert len(list(Path(store.root).rglob("quarantine.parquet"))) == 1


def test_a_finished_partition_is_found_again_wherever_the_data_lies(
    ray_session: None, tmp_path: Path, store: Store, tiny_model_dir: Path
) -> None:
    rows = make_rows(["a", "b"])
    first = write_jsonl(tmp_path / "here" / "a.jsonl", rows)
    stages: list[str] = []

    def partition(source: Path, config: DataConfig = SNAPSHOT) -> Partition:
        def note(stage: str, done: int, total: int) -> None:
            stages.append(stage)

        stages.clear()
        return make_partition(
            [str(source)], store, config, str(tiny_model_dir), KEYS, progress=note
        )

    made = partition(first)
    assert {"inspect", "read", "index"} <= set(stages)
    assert partition(write_jsonl(tmp_path / "there" / "b.jsonl", rows)) == made
    assert set(stages) == {"inspect"}
    others = [
        partition(first, DataConfig(delivery="snapshot", min_examples=6)),
        partition(write_jsonl(first, rows[1:])),
    ]
    assert len({made.partition_id, *(other.partition_id for other in others)}) == 3


KILLED = """
    import os, signal, sys
    import ray
    from partition_rows import KEYS
    from pipelines.rows.partition import make_partition
    from ptuning.data.examples import DataConfig
    from ptuning.store import Store

    def progress(stage, done, total):
        if stage == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    ray.init(address=sys.argv[2], log_to_driver=False, logging_level="ERROR")
    store, config = Store(sys.argv[4]), DataConfig()
    make_partition([sys.argv[3]], store, config, sys.argv[5], KEYS, progress=progress)
"""


@pytest.mark.parametrize("stage", ["read", "index"])
def test_a_killed_partition_is_not_taken_for_whole_and_is_made_again(
    ray_session: None, tmp_path: Path, store: Store, tiny_model_dir: Path, stage: str
) -> None:
    import ray

    rows = make_rows([f"u{n}" for n in range(20)])
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    address = ray.get_runtime_context().gcs_address
    killed = subprocess.run(
        [
            *(sys.executable, "-c", textwrap.dedent(KILLED)),
            *(stage, address, str(source), store.root, str(tiny_model_dir)),
        ],
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert killed.returncode == -signal.SIGKILL
    assert not store.exists("partitions/latest")
    made = make_partition([str(source)], store, CONFIG, str(tiny_model_dir), KEYS)
    assert read_all(store, made) == expected_users(rows)


@pytest.mark.parametrize("stage", ["read", "index"])
def test_killed_workers_lose_no_row_and_count_none_twice(
    ray_session: None, tmp_path: Path, store: Store, template: Template, stage: str
) -> None:
    import ray

    rows = make_rows([f"u{n}" for n in range(30)])
    for number in range(30):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", rows[number::30])
    pid = ray.remote(num_cpus=0.1)(lambda: os.getpid())
    workers = set(ray.get([pid.remote() for _ in range(40)], timeout=60))

    def kill(now: str, done: int, total: int) -> None:
        while now == stage and workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(workers.pop(), signal.SIGKILL)

    source = str(tmp_path / "in")
    made = make_partition([source], store, CONFIG, template, KEYS, progress=kill, sizes=SMALL)
    assert not workers
    assert made.rows_read == len(rows)
    assert read_all(store, made) == expected_users(rows)


def test_without_ray_the_error_says_so(
    tmp_path: Path, store: Store, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(RunError, match="Ray is not initialised"):
        make_partition([str(tmp_path)], store, CONFIG, template, KEYS, sizes=SMALL)


def test_a_user_without_gathered_rows_is_an_error(
    ray_session: None, tmp_path: Path, store: Store, template: Template
) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", make_rows(["a", "b"])))
    made = make_partition([source], store, CONFIG, template, KEYS)
    gather_users(store, made, [(KEYS.user_key("a"), 10)], "rows")
    with pytest.raises(RunError, match="no rows in the run's folder"):
        read_users(store, "rows", [KEYS.user_key("a"), KEYS.user_key("b")])


def test_the_shared_chat_data(ray_session: None, tmp_path: Path, template: Template) -> None:
    root = os.environ.get("PTUNING_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data"
    source = Path(root) / "ubuntu-irc-100users.jsonl"
    if not source.is_file():
        pytest.skip("no shared data: set PTUNING_SHARED_DATA to its folder")
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    store = Store(tmp_path)
    made = make_partition([str(source)], store, DataConfig(max_rows=40), template, KEYS)
    assert (made.users, made.rows_read, made.rows_kept) == (100, 6000, 4000)
    assert read_all(store, made) == expected_users(rows, max_rows=40)
