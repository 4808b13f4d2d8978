"""Processes are killed during a run: no user is lost or committed twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import command, config_of, registry_of, start, user_rows, write_rows
from salted import user_key

from ptuning.store import prefix_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

USERS = [f"user{n}" for n in range(8)]
# Two users per pack and many epochs: long enough for a kill in the middle.
SLOW = ("train.pack_users=2", "train.epochs=150", "train.patience=null", "ray.workers=1")


def _wait(what: str, process: subprocess.Popen[bytes], found: Callable[[], Any], log: Path) -> Any:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if value := found():
            return value
        if process.poll() is not None and not found():
            pytest.fail(f"the run ended before {what}:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)
    return pytest.fail(f"no {what} in time:\n{log.read_text()[-3000:]}")


def _done(store: Path) -> list[Path]:
    return sorted(store.glob("runs/*/done/*.json"))


def _records(store: Path) -> list[dict[str, Any]]:
    """The records of packs that were done; the pack whose worker was killed was split."""
    found = [json.loads(path.read_text()) for path in _done(store)]
    return [record for record in found if "users" in record]


def _finish(process: subprocess.Popen[bytes], log: Path) -> None:
    try:
        code = process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"the run hangs:\n{log.read_text()[-3000:]}")
    assert code == 0, log.read_text()[-3000:]


def _check_everybody_once(store: Path, model: Path) -> dict[str, Any]:
    (summary,) = [json.loads(path.read_text()) for path in store.glob("runs/*/summary.json")]
    assert summary["users"]["trained"] == len(USERS)
    assert summary["users"]["failed"] == 0
    records = _records(store)
    trained = [user["user_key"] for record in records for user in record["users"]]
    assert sorted(trained) == sorted(user_key(user) for user in USERS)
    registry = registry_of(store, config_of(model))
    current = registry.current([user_key(user) for user in USERS])
    digests = {u["user_key"]: u["digest"] for record in records for u in record["users"]}
    for user in USERS:
        candidate = current[user_key(user)].candidate
        assert candidate is not None
        assert candidate.version == "1"
        assert candidate.digest == digests[user_key(user)]
        assert (store / prefix_path(user_key(user), candidate.digest)).is_file()
    assert not list(store.rglob("*.tmp"))
    return dict(summary)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [row for user in USERS for row in user_rows(user, 10)]
    return write_rows(tmp_path / "rows.jsonl", rows)


def test_a_killed_worker_is_replaced_and_training_continues(
    data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    process = start(command(data, store, tiny_model_dir, *SLOW), log)
    try:
        first = _wait("first commit", process, lambda: _done(store), log)
        worker = int(json.loads(first[0].read_text())["attempt"].rsplit("-", 1)[1])
        os.kill(worker, signal.SIGKILL)
        _finish(process, log)
    finally:
        process.kill()
    _check_everybody_once(store, tiny_model_dir)
    attempts = {record["attempt"] for record in _records(store)}
    assert len(attempts) == 2, "the kill came too late to show anything"


def test_a_killed_driver_resumes_its_run_and_repeats_no_committed_user(
    data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    arguments = command(data, store, tiny_model_dir, *SLOW)
    process = start(arguments, log)
    committed = _wait("first commit", process, lambda: _done(store), log)
    before = {path: path.read_bytes() for path in committed}
    process.kill()
    process.wait(timeout=30)
    assert not list(store.glob("runs/*/summary.json")), "the kill came too late to show anything"
    again = start(arguments, log)
    try:
        _finish(again, log)
    finally:
        again.kill()
    summary = _check_everybody_once(store, tiny_model_dir)
    assert len(list(store.glob("runs/*"))) == 1
    for path, content in before.items():
        assert path.read_bytes() == content
        assert summary["run_id"] in str(path)
