"""During a run nothing listens beyond loopback, whatever its workers agree on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from listening import watch_listeners

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_no_port_of_a_sharded_run_is_open_beyond_loopback(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Of workers that hold the whole model, test_run_command.py says the same."""
    data = tmp_path / "rows.jsonl"
    with data.open("w") as file:
        for user in ("ann", "bob", "cy", "dee"):
            for n in range(12):
                row = {"user_id": user, "prompt": f"question {n}", "completion": f"{user} {n}"}
                file.write(json.dumps(row) + "\n")
    settings = (
        "backbone.sharding=zero3",
        "backbone.dtype=float32",
        "ray.workers=2",
        "train.pack_users=2",
        "train.epochs=2",
    )
    with watch_listeners() as listeners:
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", "run", "--data", str(data)]
            + ["--store", str(tmp_path / "store"), "--model", str(tiny_model_dir)]
            + [word for setting in settings for word in ("--set", setting)],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                **listeners.environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-3000:]
    listeners.check_loopback()
