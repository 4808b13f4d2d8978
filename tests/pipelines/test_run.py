"""The run, end to end on real Ray, Ray Train, MLflow (and DeepSpeed), with a tiny backbone."""

from __future__ import annotations

import base64
import gzip
import io
import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from runs import config_of, registry_of, user_rows, users_of, write_rows
from safetensors.torch import load_file
from salted import user_key

from pipelines.config import RunConfig
from pipelines.report.progress import RunProgress
from pipelines.run import execute
from ptuning.errors import DataError, RunError
from ptuning.store import Store, prefix_path

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

USERS = {"ann": 10, "bob": 14, "cy/../../x": 12, "few": 3, "Ωmega": 11}


def _data(folder: Path, users: dict[str, int] = USERS, seed: int = 0) -> Path:
    rows = [row for user, count in users.items() for row in user_rows(user, count, seed)]
    return write_rows(folder / "rows.jsonl", rows)


def _run(data: Path, store: Path, config: RunConfig) -> dict[str, Any]:
    with RunProgress() as progress:
        facts = execute([str(data)], Store(store), config, progress)
    summary: dict[str, Any] = json.loads(
        (store / "runs" / facts.run_id / "summary.json").read_text()
    )
    return summary


def _prefixes(store: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The prefixes that this run trained, by user key. Other runs may have trained the user too."""
    return {
        row["user_key"]: load_file(store / prefix_path(row["user_key"], row["digest"]))[
            "decoder.0.keys"
        ]
        for row in users_of(store, summary["run_id"])
        if row["digest"] is not None
    }


@pytest.fixture(scope="module")
def finished(
    ray_session: None, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, Any]]:
    """One finished run: (data, store, summary)."""
    folder = tmp_path_factory.mktemp("run")
    data, store = _data(folder), folder / "store"
    return data, store, _run(data, store, config_of(tiny_model_dir))


def test_a_run_trains_everybody_with_enough_rows_and_says_so(
    finished: tuple[Path, Path, dict[str, Any]],
) -> None:
    _, store, summary = finished
    users = summary["users"]
    assert users["total"] == len(USERS)
    assert users["too_few"] == 1
    assert users["trained"] == users["promoted"] + users["rejected"] + users["pending"] == 4
    assert summary["nll"]["candidate"] < summary["nll"]["base"]
    run = store / "runs" / summary["run_id"]
    table = {row["user_id"]: row for row in users_of(store, summary["run_id"])}
    assert set(table) == set(USERS)
    assert table["few"]["status"] == "too_few"
    assert table["few"]["digest"] is None
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    for user in ("ann", "bob"):
        path = store / prefix_path(user_key(user), table[user]["digest"])
        assert path.is_file()


def test_the_registry_holds_each_users_own_prefix_with_lineage(
    finished: tuple[Path, Path, dict[str, Any]], tiny_model_dir: Path
) -> None:
    _, store, summary = finished
    registry = registry_of(store, config_of(tiny_model_dir))
    for row in users_of(store, summary["run_id"]):
        current = registry.current([row["user_key"]]).get(row["user_key"])
        if row["status"] != "trained":
            assert current is None
            continue
        assert current is not None
        assert current.candidate is not None
        assert current.candidate.digest == row["digest"]
        is_champion = current.champion is not None
        assert is_champion == (row["decision"] == "promoted")


FORMS = [
    "Ωmega".encode(),
    "Ωmega".encode("utf-16-le"),
    b"\\u03a9mega",
    b"\\u03A9mega",
    b"%CE%A9mega",
    b"%ce%a9mega",
    repr("Ωmega".encode()).encode()[2:-1],  # as Python prints bytes
    base64.b64encode("Ωmega".encode())[:8],
]


def _texts(path: Path) -> Iterator[bytes]:
    """A file's content, as it is and decompressed."""
    data = path.read_bytes()
    yield data
    if data[:4] == b"PAR1":
        yield repr(pq.read_table(io.BytesIO(data)).to_pydict()).encode()
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    if data[:15] == b"SQLite format 3":
        yield "\n".join(sqlite3.connect(path).iterdump()).encode()


def test_ids_of_users_stand_only_in_inputs_partitions_and_users_tables(
    finished: tuple[Path, Path, dict[str, Any]],
) -> None:
    """Nowhere else, in no form (plain, escaped, quoted, encoded, compressed), nor in Ray's logs."""
    _, store, _ = finished
    node: Any = ray._private.worker._global_node
    logs = Path(node.get_session_dir_path())
    files = [path for root in (store, logs) for path in root.rglob("*") if path.is_file()]
    holders = [
        path for path in files if any(form in text for text in _texts(path) for form in FORMS)
    ]
    assert any(path.is_relative_to(store / "runs") for path in holders), "no file was searched"
    for path in holders:
        assert path.is_relative_to(store), path
        parts = path.relative_to(store).parts
        assert parts[0] in ("inputs", "partitions") or (parts[0] == "runs" and parts[2] == "users")


def test_a_second_run_on_the_same_data_changes_nothing(
    finished: tuple[Path, Path, dict[str, Any]], tiny_model_dir: Path
) -> None:
    data, store, first = finished
    before = sorted((store / "prefixes").rglob("*.safetensors"))
    again = _run(data, store, config_of(tiny_model_dir))
    assert again["run_id"] != first["run_id"]
    assert again["users"]["unchanged"] == first["users"]["trained"]
    assert again["users"]["trained"] == again["tokens_trained"] == 0
    assert sorted((store / "prefixes").rglob("*.safetensors")) == before


def test_another_gate_judges_again_without_training_and_as_training_would(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    data, store = _data(tmp_path, {"ann": 10, "bob": 11}), tmp_path / "store"
    strict, mild = (config_of(tiny_model_dir, f"gate.min_gain={gain}") for gain in (99, -10))
    registry = registry_of(store, strict)
    first = _run(data, store, strict)
    assert first["users"]["trained"] == first["users"]["rejected"] == 2
    assert registry.champion(user_key("ann")) is None
    reasons = {row["user_id"]: row["reason"] for row in users_of(store, first["run_id"])}
    for config, decision in ((mild, "promoted"), (strict, "rejected")):
        judged = _run(data, store, config)
        assert judged["users"]["trained"] == judged["tokens_trained"] == 0
        assert judged["users"]["unchanged"] == judged["judged_again"][decision] == 2
        assert registry.champion(user_key("ann")) is not None, "judging again removes no champion"
        rows = {row["user_id"]: row for row in users_of(store, judged["run_id"])}
        assert (rows["ann"]["status"], rows["ann"]["decision"]) == ("unchanged", decision)
    assert {user: row["reason"] for user, row in rows.items()} == reasons
    for path in (store / "runs").glob("*/done"):
        shutil.rmtree(path)
    again = _run(data, store, mild)
    assert again["users"]["trained"] == 2, "missing losses are computed again"


def test_a_damaged_prefix_file_is_noticed(tiny_model_dir: Path, tmp_path: Path) -> None:
    """No user stays unchanged with a file that cannot be served."""
    data, store = _data(tmp_path, {"ann": 10, "bob": 11}), tmp_path / "store"
    _run(data, store, config_of(tiny_model_dir))
    (path,) = (store / "prefixes").glob(f"*/{user_key('ann')}/*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    again = _run(data, store, config_of(tiny_model_dir))
    assert (again["users"]["trained"], again["users"]["unchanged"]) == (1, 1)
    assert path.read_bytes() == whole


def test_users_whose_rows_are_gone_are_no_longer_served(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    store, always = tmp_path / "store", ("gate.min_gain=-10",)
    everybody = {"ann": 10, "bob": 11, "cyd": 12, "dan": 13, "eve": 14}
    first = _run(_data(tmp_path, everybody), store, config_of(tiny_model_dir, *always))
    assert first["users"]["promoted"] == 5
    registry = registry_of(store, config_of(tiny_model_dir))
    left = {user: everybody[user] for user in ("cyd", "dan", "eve")} | {"ann": 3}  # bob is gone
    with pytest.raises(RunError, match=r"data\.max_shrink") as stopped:
        _run(_data(tmp_path, left), store, config_of(tiny_model_dir, *always))
    assert stopped.value.seen == "2 of 5 served users"
    assert len(list(registry.with_champion())) == 5, "a run that stopped changed nothing"

    second = _run(
        _data(tmp_path, left), store, config_of(tiny_model_dir, *always, "data.max_shrink=1")
    )
    users = second["users"]
    assert (users["total"], users["unchanged"], users["retired"]) == (5, 3, 2)
    for user in ("ann", "bob"):
        assert registry.champion(user_key(user)) is None
    table = {row["user_key"]: row for row in users_of(store, second["run_id"])}
    assert table[user_key("ann")]["user_id"] == "ann"
    assert table[user_key("bob")]["user_id"] is None, "no table keeps the id of a removed user"

    third = _run(_data(tmp_path, everybody), store, config_of(tiny_model_dir, *always))
    assert (third["users"]["trained"], third["users"]["unchanged"]) == (2, 3)
    assert registry.champion(user_key("bob")) is not None


class _StopsAt(RunProgress):
    """Interrupts the run at the start of a stage, like Ctrl-C."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._last = name

    def stage(self, name: str, total: int | None = None, *, unit: str = "users") -> None:
        if name == self._last:
            raise KeyboardInterrupt
        super().stage(name, total, unit=unit)


def test_an_older_run_that_is_resumed_moves_no_alias_back(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    settings = ("gate.min_gain=-10", "data.delivery=snapshot")
    store, config = tmp_path / "store", config_of(tiny_model_dir, *settings)
    (tmp_path / "monday").mkdir()
    monday = _data(tmp_path / "monday", {"ann": 10, "bob": 11})
    with pytest.raises(KeyboardInterrupt), _StopsAt("tune") as progress:
        execute([str(monday)], Store(store), config, progress)
    tuesday = _data(tmp_path, {"ann": 14, "bob": 15})
    newer = _run(tuesday, store, config)
    assert newer["users"]["promoted"] == 2
    older = _run(monday, store, config)
    assert older["run_id"] < newer["run_id"], "it was resumed"
    assert older["users"]["pending"] == older["users"]["trained"] == 2
    again = _run(tuesday, store, config)
    assert (again["users"]["unchanged"], again["users"]["trained"]) == (2, 0)
    registry = registry_of(store, config_of(tiny_model_dir))
    rows = {row["user_key"]: row["digest"] for row in users_of(store, newer["run_id"])}
    for key, digest in rows.items():
        now = registry.current([key])[key]
        assert now.candidate is not None
        assert now.champion is not None
        assert now.candidate.digest == now.champion.digest == digest


def test_only_the_user_with_new_rows_is_trained_again(
    finished: tuple[Path, Path, dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    _, store, _ = finished
    data = _data(tmp_path, USERS | {"bob": 15})
    summary = _run(data, store, config_of(tiny_model_dir, "data.delivery=snapshot"))
    assert summary["users"]["trained"] == 1
    assert summary["users"]["unchanged"] == 3


def test_neighbours_workers_and_packs_do_not_change_a_users_prefix(
    finished: tuple[Path, Path, dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """One worker with one pack of all users, against two workers with packs of two users."""
    _, store, finished_summary = finished
    others = ("ray.workers=2", "train.pack_users=2")
    shared = {user: count for user, count in USERS.items() if user not in ("few", "cy/../../x")}
    other = tmp_path / "store"
    summary = _run(_data(tmp_path, shared | {"new": 20}), other, config_of(tiny_model_dir, *others))
    records = [json.loads(p.read_text()) for p in (other / "runs").glob("*/done/*.json")]
    assert len(records) == 2, "two packs, for whichever of the two workers took them"
    assert summary["users"]["trained"] == len(shared) + 1
    first, second = _prefixes(store, finished_summary), _prefixes(other, summary)
    for user in shared:
        assert (first[user_key(user)] - second[user_key(user)]).abs().max() < 1e-4, user


def test_a_sharded_gang_with_unequal_work_trains_the_prefixes_of_a_whole_backbone(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """DeepSpeed ZeRO-3 with two real gloo workers, from partition to registration."""
    data = _data(tmp_path, {"ann": 40, "bob": 8, "cy": 9, "dee": 11, "eve": 60})
    summaries = {}
    for sharding in ("replicate", "zero3"):
        config = config_of(
            tiny_model_dir,
            f"backbone.sharding={sharding}",
            "ray.workers=2",
            "train.pack_users=2",
        )
        summaries[sharding] = _run(data, tmp_path / sharding, config)
    whole, sharded = (
        _prefixes(tmp_path / sharding, summaries[sharding]) for sharding in ("replicate", "zero3")
    )
    assert set(whole) == set(sharded)
    assert len(whole) == 5
    for key, kv in whole.items():
        assert (kv - sharded[key]).abs().max() < 1e-4
    assert summaries["replicate"]["users"] == summaries["zero3"]["users"]


def test_too_many_bad_rows_fail_the_run_and_name_the_quarantine(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = _data(tmp_path)
    data.write_text(data.read_text() + "not json\n" * 20)
    with pytest.raises(DataError, match="quarantine"):
        _run(data, tmp_path / "store", config_of(tiny_model_dir))
