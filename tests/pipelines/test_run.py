"""The run, end to end on real Ray, Ray Train, MLflow (and DeepSpeed), with a tiny backbone."""

from __future__ import annotations

import base64
import gzip
import io
import json
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from listening import Listeners, watch_listeners
from runs import command, config_of, registry_of, start, user_rows, users_of, write_rows
from safetensors.torch import load_file
from salted import user_key

from pipelines.config import RunConfig
from pipelines.report.progress import RunProgress
from pipelines.run import execute
from ptuning.errors import DataError, RunError
from ptuning.store import Store, prefix_path

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

USERS = {"ann": 10, "bob": 14, "cy/../../x": 12, "few": 3, "Ωmega": 11}
STRICT, MILD = (("train.pack_users=1", f"gate.min_gain={gain}") for gain in (99, -10))
SHARED = ("ann", "bob", "Ωmega")  # with other neighbours in another run
SCATTERED = ("ray.workers=2", "train.pack_users=2")
SNAPSHOT = "data.delivery=snapshot"


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


@pytest.fixture(scope="module")
def rejected(
    ray_session: None, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, Any]]:
    """A finished run that promoted nobody, with a pack for each user: (data, store, summary).
    Tests that change the store use a copy."""
    folder = tmp_path_factory.mktemp("rejected")
    data, store = _data(folder, {"ann": 10, "bob": 11, "cyd": 12, "dan": 13}), folder / "store"
    return data, store, _run(data, store, config_of(tiny_model_dir, *STRICT))


@pytest.fixture(scope="module")
def scattered(
    ray_session: None, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, Any]]:
    """Some of the same users in a run of two workers with unequal work: (data, store, summary)."""
    folder = tmp_path_factory.mktemp("scattered")
    users = {user: count for user, count in USERS.items() if user in SHARED}
    data, store = _data(folder, users | {"new": 60, "eve": 40}), folder / "store"
    return data, store, _run(data, store, config_of(tiny_model_dir, *SCATTERED))


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
    rejected: tuple[Path, Path, dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    data, finished_store, first = rejected
    store = shutil.copytree(finished_store, tmp_path / "store")
    strict, mild = (config_of(tiny_model_dir, *gate) for gate in (STRICT, MILD))
    registry = registry_of(store, strict)
    assert first["users"]["trained"] == first["users"]["rejected"] == 4
    assert registry.champion(user_key("ann")) is None
    reasons = {row["user_id"]: row["reason"] for row in users_of(store, first["run_id"])}
    for config, decision in ((mild, "promoted"), (strict, "rejected")):
        judged = _run(data, store, config)
        assert judged["users"]["trained"] == judged["tokens_trained"] == 0
        assert judged["users"]["unchanged"] == judged["judged_again"][decision] == 4
        assert registry.champion(user_key("ann")) is not None, "a gate takes nobody's champion"
        rows = {row["user_id"]: row for row in users_of(store, judged["run_id"])}
        assert (rows["ann"]["status"], rows["ann"]["decision"]) == ("unchanged", decision)
    assert {user: row["reason"] for user, row in rows.items()} == reasons


@dataclass(frozen=True)
class Changed:
    """A run after several changes at once, and the users tables of both runs, by user id."""

    damaged_file: Path
    whole: bytes
    summary: dict[str, Any]
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def changed(
    rejected: tuple[Path, Path, dict[str, Any]],
    tiny_model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Changed:
    """Another gate; and before it ran, ann's prefix file was damaged, bob got new rows and cyd's
    losses were lost. Every user has their own pack, so none of it touches another's training."""
    folder = tmp_path_factory.mktemp("changed")
    _, finished_store, first = rejected
    store = shutil.copytree(finished_store, folder / "store")
    (path,) = (store / "prefixes").glob(f"*/{user_key('ann')}/*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    (lost,) = (p for p in store.glob("runs/*/done/*.json") if user_key("cyd") in p.read_text())
    lost.unlink()
    data = _data(folder, {"ann": 10, "bob": 15, "cyd": 12, "dan": 13})
    summary = _run(data, store, config_of(tiny_model_dir, *MILD, SNAPSHOT))
    before, after = (
        {row["user_id"]: row for row in users_of(store, one["run_id"])} for one in (first, summary)
    )
    return Changed(path, whole, summary, before, after)


def test_a_damaged_prefix_file_is_noticed(changed: Changed) -> None:
    """Nobody stays unchanged on a file that cannot serve."""
    assert changed.after["ann"]["status"] == "trained"
    assert changed.damaged_file.read_bytes() == changed.whole


def test_only_users_with_new_rows_or_without_what_they_need_are_trained_again(
    changed: Changed,
) -> None:
    assert (changed.summary["users"]["trained"], changed.summary["users"]["unchanged"]) == (3, 1)
    digests = {user: row["digest"] for user, row in changed.before.items()}
    assert changed.after["bob"]["status"] == "trained"
    assert changed.after["bob"]["digest"] != digests["bob"]
    assert changed.after["dan"]["status"] == "unchanged"
    assert changed.after["dan"]["digest"] == digests["dan"]


def test_losses_that_nobody_has_are_made_anew(changed: Changed) -> None:
    assert changed.after["cyd"]["status"] == "trained"
    assert changed.after["cyd"]["decision"] == "promoted"
    assert changed.after["dan"]["decision"] == "promoted", "by the losses that it has"


def test_rows_that_went_away_stop_being_served(
    finished: tuple[Path, Path, dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    data, finished_store, _ = finished
    store, always = shutil.copytree(finished_store, tmp_path / "store"), (MILD[1], SNAPSHOT)
    _run(data, store, config_of(tiny_model_dir, *always))
    registry = registry_of(store, config_of(tiny_model_dir))
    assert len(list(registry.with_champion())) == 4
    left = USERS | {"ann": 3}
    del left["bob"]
    with pytest.raises(RunError, match=r"data\.max_shrink") as stopped:
        _run(_data(tmp_path, left), store, config_of(tiny_model_dir, *always))
    assert stopped.value.seen == "2 of 4 served users"
    assert len(list(registry.with_champion())) == 4, "a run that stops has changed nothing"

    second = _run(
        _data(tmp_path, left), store, config_of(tiny_model_dir, *always, "data.max_shrink=1")
    )
    users = second["users"]
    assert (users["total"], users["unchanged"], users["retired"]) == (5, 2, 2)
    for user in ("ann", "bob"):
        assert registry.champion(user_key(user)) is None
    table = {row["user_key"]: row for row in users_of(store, second["run_id"])}
    assert table[user_key("ann")]["user_id"] == "ann"
    assert table[user_key("bob")]["user_id"] is None, "no table keeps the id of a removed user"

    third = _run(data, store, config_of(tiny_model_dir, *always))
    assert (third["users"]["trained"], third["users"]["unchanged"]) == (2, 2)
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
    settings = ("gate.min_gain=-10", SNAPSHOT)
    store, config = tmp_path / "store", config_of(tiny_model_dir, *settings)
    (tmp_path / "monday").mkdir()
    monday = _data(tmp_path / "monday", {"ann": 10, "bob": 11})
    with pytest.raises(KeyboardInterrupt), _StopsAt("tune") as progress:
        execute([str(monday)], Store(store), config, progress)
    (begun,) = Store(store).list("runs")
    tuesday = _data(tmp_path, {"ann": 14, "bob": 15})
    newer = _run(tuesday, store, config)
    assert newer["users"]["promoted"] == 2
    older = _run(monday, store, config)
    assert older["run_id"] == begun, "it was resumed"
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


def test_neighbours_workers_and_packs_do_not_change_a_users_prefix(
    finished: tuple[Path, Path, dict[str, Any]], scattered: tuple[Path, Path, dict[str, Any]]
) -> None:
    """One worker with one pack of all users, against two workers with packs of two users."""
    _, store, finished_summary = finished
    _, other, summary = scattered
    records = [json.loads(p.read_text()) for p in (other / "runs").glob("*/done/*.json")]
    assert len(records) == 3, "packs, for whichever of the two workers took them"
    assert summary["users"]["trained"] == len(SHARED) + 2
    first, second = _prefixes(store, finished_summary), _prefixes(other, summary)
    for user in SHARED:
        assert (first[user_key(user)] - second[user_key(user)]).abs().max() < 1e-4, user


@pytest.fixture(scope="module")
def sharded(
    scattered: tuple[Path, Path, dict[str, Any]],
    tiny_model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any], Listeners]:
    """`ptuning run` on the same rows with ZeRO-3, in a Ray of its own: (store, summary, where its
    processes listened)."""
    folder = tmp_path_factory.mktemp("sharded")
    store, log = folder / "store", folder / "log"
    typed = command(scattered[0], store, tiny_model_dir, *SCATTERED, "backbone.sharding=zero3")
    with watch_listeners() as listeners:
        process = start(typed, log, **listeners.environment)
        try:
            code = process.wait(timeout=300)
        finally:
            process.kill()
    assert code == 0, log.read_text()[-3000:]
    (path,) = store.glob("runs/*/summary.json")
    return store, json.loads(path.read_text()), listeners


def test_a_sharded_gang_with_unequal_work_trains_the_prefixes_of_a_whole_backbone(
    scattered: tuple[Path, Path, dict[str, Any]], sharded: tuple[Path, dict[str, Any], Listeners]
) -> None:
    """DeepSpeed ZeRO-3 on two real gloo workers, from partition to registration."""
    _, whole_store, replicated = scattered
    store, summary, _ = sharded
    whole, kvs = _prefixes(whole_store, replicated), _prefixes(store, summary)
    assert set(whole) == set(kvs)
    assert len(whole) == 5
    for key, kv in whole.items():
        assert (kv - kvs[key]).abs().max() < 1e-4
    assert replicated["users"] == summary["users"]


def test_no_port_of_a_sharded_run_is_open_beyond_loopback(
    sharded: tuple[Path, dict[str, Any], Listeners],
) -> None:
    """Of workers that hold the whole model, test_run_command.py says the same."""
    _, _, listeners = sharded
    listeners.check_loopback()


def test_too_many_bad_rows_fail_the_run_and_name_the_quarantine(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = _data(tmp_path)
    data.write_text(data.read_text() + "not json\n" * 20)
    with pytest.raises(DataError, match="quarantine"):
        _run(data, tmp_path / "store", config_of(tiny_model_dir))
