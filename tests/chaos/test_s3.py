"""Inputs and store on a real S3 server: a killed driver's run is resumed, and is anybody's once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from runs import command, config_of, registry_of, start, user_rows, write_rows
from salted import user_key
from store_backends import make_bucket

from ptuning.store import Store, prefix_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

USERS = [f"user{n}" for n in range(6)]


def _records(store: Store) -> list[dict[str, Any]]:
    """The done-records of the one run there is."""
    for run_id in store.list("runs"):
        folder = f"runs/{run_id}/done"
        return [store.read_json(f"{folder}/{name}") for name in store.list(folder)]
    return []


@pytest.mark.usefixtures("s3_server")
def test_a_run_on_s3_survives_its_driver_and_the_next_one_reads_and_trains_what_is_new(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    bucket, log = make_bucket(), tmp_path / "log"
    inputs, store = Store(f"s3://{bucket}/in"), Store(f"s3://{bucket}/some/store")
    rows = [row for user in USERS for row in user_rows(user, 10)]
    inputs.write("a.jsonl", write_rows(tmp_path / "a.jsonl", rows).read_bytes())
    settings = (
        *("train.pack_users=2", "train.epochs=40", "train.patience=null"),
        f"registry.uri=sqlite:///{tmp_path / 'mlflow.db'}",
    )
    arguments = command(tmp_path, tmp_path, tiny_model_dir, *settings)
    places = {"--data": inputs.root, "--store": store.root}
    for option, place in places.items():
        arguments[arguments.index(option) + 1] = place

    process = start(arguments, log)
    end = time.monotonic() + 240
    while not _records(store) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    process.kill()
    process.wait(30)
    before = _records(store)
    assert before, log.read_text()[-3000:]
    assert len(before) < 3, "the kill came too late to show anything"

    assert start(arguments, log).wait(300) == 0, log.read_text()[-3000:]
    after = _records(store)
    assert all(record in after for record in before)
    digests = {user["user_key"]: user["digest"] for record in after for user in record["users"]}
    assert sorted(digests) == sorted(user_key(user) for user in USERS)
    registry = registry_of(store.root, config_of(tiny_model_dir, *settings))
    for key, now in registry.current(digests).items():
        assert now.candidate is not None
        assert (now.candidate.version, now.candidate.digest) == ("1", digests[key])
        assert store.exists(prefix_path(key, now.candidate.digest))

    inputs.write("b.jsonl", write_rows(tmp_path / "b.jsonl", user_rows("new", 9)).read_bytes())
    assert start(arguments, log).wait(300) == 0, log.read_text()[-3000:]
    assert "partition: read: 9 rows" in log.read_text()
    (newest,) = [
        summary
        for run_id in store.list("runs")
        if (summary := store.read_json(f"runs/{run_id}/summary.json"))["users"]["trained"] == 1
    ]
    assert (newest["users"]["unchanged"], newest["rows"]["read"]) == (len(USERS), 69)
