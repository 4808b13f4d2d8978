"""A user whose rows kill the worker is found, tried alone and given up. All others are trained."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from runs import command, config_of, registry_of, start, user_rows, users_of, write_rows
from salted import user_key

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

USERS = [f"user{n}" for n in range(8)]
POISON = "poison pill"
# Every Python process of the run executes this at start. When rows are encoded for training, a
# prompt that contains the pill triggers ACTION.
SITE = """
import importlib.abc, os, signal, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "ptuning.pack":
            return None
        sys.meta_path.remove(self)
        import importlib.util
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            encode = module.encode_user
            def encode_user(template, recipe, user_key, examples):
                if any("poison pill" in (example.prompt or "") for example in examples):
                    ACTION
                return encode(template, recipe, user_key, examples)
            module.encode_user = encode_user
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
ACTIONS = {
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
    "allocation": "bytearray(1 << 60)",
}


@pytest.mark.parametrize("how", ACTIONS)
def test_a_user_who_kills_workers_is_given_up_and_all_others_are_trained(
    how: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE.replace("ACTION", ACTIONS[how]))
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    rows = [row for user in USERS for row in user_rows(user, 10)]
    for row in rows:
        if row["user_id"] == "user3":
            row["prompt"] += " " + POISON
    data, store, log = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "store", tmp_path / "l"
    settings = ("train.pack_users=4", "ray.workers=2")
    process = start(command(data, store, tiny_model_dir, *settings), log)
    try:
        code = process.wait(timeout=300)
    finally:
        process.kill()
    said = log.read_text()
    assert code == 3, said[-3000:]
    (path,) = store.glob("runs/*/summary.json")
    summary: dict[str, Any] = json.loads(path.read_text())
    users = summary["users"]
    assert (users["total"], users["trained"], users["failed"]) == (8, 7, 1)
    (failure,) = summary["failures"]
    assert failure["user_key"] == user_key("user3")
    assert "trained this user alone" in failure["error"]
    table = {row["user_id"]: row for row in users_of(store, summary["run_id"])}
    assert {user for user, row in table.items() if row["status"] == "failed"} == {"user3"}
    registry = registry_of(store, config_of(tiny_model_dir))
    current = registry.current([user_key(user) for user in USERS])
    assert {*current} == {user_key(user) for user in USERS if user != "user3"}
    for key, now in current.items():
        assert now.candidate is not None
        assert now.candidate.version == "1", f"{key} was committed twice"
    assert "user3" not in said, "the log names keys, not ids"
    assert f"user {user_key('user3')} is given up" in said
