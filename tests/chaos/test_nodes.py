"""Runs on several nodes: gangs are placed per node, start on new nodes and end with killed ones."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from runs import command, config_of, registry_of, start, user_rows, write_rows
from salted import user_key

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

USERS = [f"user{n}" for n in range(12)]
SLOW = ("train.pack_users=1", "train.epochs=300", "train.patience=null")


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster of one node with two CPUs, in separate processes. Tests add nodes."""
    sizes = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=sizes)
    try:
        yield started
    finally:
        started.shutdown()


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=2, object_store_memory=100 << 20)


def records_of(store: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in store.glob("runs/*/done/*.json")]
    return [record for record in found if "users" in record]  # the others were split


def gangs_of(store: Path) -> set[str]:
    return {record["attempt"].split("/")[0].rsplit("-", 1)[1] for record in records_of(store)}


def test_a_node_that_joins_a_run_is_used_and_killing_it_loses_no_user(
    cluster: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = [row for user in USERS for row in user_rows(user, 10)]
    data, store, log = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "store", tmp_path / "l"
    more = (*SLOW, f"ray.address={cluster.address}", "ray.workers=2", "ray.cpus_per_worker=2")

    def wait_for(gangs: int) -> None:
        deadline = time.monotonic() + 240
        while len(gangs_of(store)) < gangs:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)

    process = start(command(data, store, tiny_model_dir, *more), log)
    try:
        wait_for(1)
        other = add_node(cluster)
        wait_for(2)
        done = len(records_of(store))
        cluster.remove_node(other, allow_graceful=False)
        code = process.wait(timeout=300)
    finally:
        process.kill()
    said = log.read_text()
    assert code == 0, said[-3000:]
    assert done < len(USERS) - 1, "the kill came too late to show anything"
    (path,) = store.glob("runs/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["users"]["trained"] == len(USERS)
    trained = [user["user_key"] for record in records_of(store) for user in record["users"]]
    assert sorted(trained) == sorted(user_key(user) for user in USERS)
    registry = registry_of(store, config_of(tiny_model_dir))
    for key, now in registry.current(trained).items():
        assert now.candidate is not None
        assert now.candidate.version == "1", f"{key} was committed twice"


def test_a_worker_that_fits_on_no_node_is_refused_and_the_error_lists_free_resources(
    cluster: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The cluster has four CPUs, but each node only two: Ray would wait for ever."""
    add_node(cluster)
    data = write_rows(tmp_path / "rows.jsonl", user_rows("ann", 10))
    store, log = tmp_path / "store", tmp_path / "log"
    more = (f"ray.address={cluster.address}", "ray.workers=1", "ray.cpus_per_worker=3")
    process = start(command(data, store, tiny_model_dir, *more), log)
    try:
        assert process.wait(timeout=120) == 1
    finally:
        process.kill()
    said = log.read_text()
    assert "no node has room for a training worker" in said
    assert "2 of 2 CPUs free" in said
    assert "1 worker of 3 CPUs" in said
