"""The run, end to end on real Ray, Ray Train, MLflow (and DeepSpeed), with a tiny backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from runs import config_of, user_rows, write_rows
from safetensors.torch import load_file

from pipelines.config import RunConfig
from pipelines.report.progress import RunProgress
from pipelines.run import execute
from ptuning.registry import open_registry
from ptuning.store import Store, prefix_path
from ptuning.types import user_key

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


def _prefixes(store: Path) -> dict[str, Any]:
    return {
        path.parent.name: load_file(path)["decoder.0.keys"]
        for path in (store / "prefixes").glob("*/*/*.safetensors")
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
    table = {row["user_id"]: row for row in pq.read_table(run / "users.parquet").to_pylist()}
    assert set(table) == set(USERS)
    assert table["few"]["status"] == "too_few"
    assert table["few"]["digest"] is None
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    for user in ("ann", "bob"):
        path = store / prefix_path(user_key(user), table[user]["digest"])
        assert path.is_file()


def test_the_registry_holds_each_users_own_prefix_with_lineage(
    finished: tuple[Path, Path, dict[str, Any]],
) -> None:
    _, store, summary = finished
    registry = open_registry(config_of(Path("x")).registry, f"sqlite:///{store}/mlflow.db")
    run = store / "runs" / summary["run_id"]
    for row in pq.read_table(run / "users.parquet").to_pylist():
        current = registry.current([row["user_key"]]).get(row["user_key"])
        if row["status"] != "trained":
            assert current is None
            continue
        assert current is not None
        assert current.candidate is not None
        assert current.candidate.digest == row["digest"]
        assert row["user_key"] in current.candidate.uri
        is_champion = current.champion is not None
        assert is_champion == (row["decision"] == "promoted")


def test_ids_of_users_stand_only_in_partitions_and_users_parquet(
    finished: tuple[Path, Path, dict[str, Any]],
) -> None:
    _, store, _ = finished
    holders = [
        path.relative_to(store)
        for path in store.rglob("*")
        if path.is_file() and "Ωmega".encode() in path.read_bytes()
    ]
    assert holders
    for path in holders:
        assert path.parts[0] == "partitions" or path.name == "users.parquet", path


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


def test_a_damaged_prefix_file_and_a_new_gate_are_noticed(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Nobody stays unchanged on a file that cannot serve, or on a gate that never judged them."""
    data, store = _data(tmp_path, {"ann": 10, "bob": 11}), tmp_path / "store"
    first = _run(data, store, config_of(tiny_model_dir))
    (path,) = (store / "prefixes").glob(f"*/{user_key('ann')}/*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    again = _run(data, store, config_of(tiny_model_dir))
    assert (again["users"]["trained"], again["users"]["unchanged"]) == (1, 1)
    assert path.read_bytes() == whole
    judged = _run(data, store, config_of(tiny_model_dir, "gate.min_gain=99"))
    assert judged["users"]["trained"] == judged["users"]["rejected"] == 2
    assert first["users"]["trained"] == 2


def test_only_the_user_with_new_rows_is_trained_again(
    finished: tuple[Path, Path, dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    _, store, _ = finished
    data = _data(tmp_path, USERS | {"bob": 15})
    summary = _run(data, store, config_of(tiny_model_dir))
    assert summary["users"]["trained"] == 1
    assert summary["users"]["unchanged"] == 3


def test_neighbours_and_workers_and_packs_do_not_change_a_users_prefix(
    finished: tuple[Path, Path, dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    _, store, _ = finished
    data = _data(tmp_path, {"ann": 10, "bob": 14, "new": 20})
    other = tmp_path / "store"
    _run(data, other, config_of(tiny_model_dir, "train.pack_users=2", "data.buckets=7"))
    first, second = _prefixes(store), _prefixes(other)
    assert (first[user_key("ann")] - second[user_key("ann")]).abs().max() < 1e-4


def test_a_sharded_gang_with_unequal_work_trains_the_prefixes_of_a_whole_backbone(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """DeepSpeed ZeRO-3 on two real gloo workers, from partition to registration."""
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
    whole, sharded = _prefixes(tmp_path / "replicate"), _prefixes(tmp_path / "zero3")
    assert set(whole) == set(sharded)
    assert len(whole) == 5
    for key, kv in whole.items():
        assert (kv - sharded[key]).abs().max() < 1e-4
    assert summaries["replicate"]["users"] == summaries["zero3"]["users"]


def test_too_many_bad_rows_fail_the_run_and_name_the_quarantine(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    from ptuning.errors import DataError

    data = _data(tmp_path)
    data.write_text(data.read_text() + "not json\n" * 20)
    with pytest.raises(DataError, match="quarantine"):
        _run(data, tmp_path / "store", config_of(tiny_model_dir))
