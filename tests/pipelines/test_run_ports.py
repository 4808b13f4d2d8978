"""During a run nothing listens beyond loopback."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MARK = "TEST_RUN_MARK"  # in the environment of every process of the run


def find_listeners(mark: str) -> dict[tuple[str, int], str]:
    """The (address, port) pairs on which processes of the run listen, with the process's name."""
    found = {}
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status != psutil.CONN_LISTEN or connection.pid is None:
            continue
        try:
            process = psutil.Process(connection.pid)
            if process.environ().get(MARK) == mark:
                found[connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port] = (
                    process.name()
                )
        except psutil.Error:
            continue  # it has ended
    return found


@pytest.mark.parametrize("sharding", ["replicate", "zero3"])
def test_no_port_of_a_run_is_open_beyond_loopback(
    sharding: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    with data.open("w") as file:
        for user in ("ann", "bob", "cy", "dee"):
            for n in range(12):
                row = {"user_id": user, "prompt": f"question {n}", "completion": f"{user} {n}"}
                file.write(json.dumps(row) + "\n")
    mark = uuid.uuid4().hex
    settings = (
        f"backbone.sharding={sharding}",
        "backbone.dtype=float32",
        "ray.workers=2",
        "train.pack_users=2",
        "train.epochs=2",
    )
    run = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "run", "--data", str(data)]
        + ["--store", str(tmp_path / "store"), "--model", str(tiny_model_dir)]
        + [word for setting in settings for word in ("--set", setting)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: mark},
        stdout=(tmp_path / "out").open("w"),
        stderr=subprocess.STDOUT,
    )
    found: dict[tuple[str, int], str] = {}
    deadline = time.monotonic() + 240
    while run.poll() is None and time.monotonic() < deadline:
        found |= find_listeners(mark)
        time.sleep(0.25)  # the search takes CPU time from the run
    if run.poll() is None:
        run.kill()
    assert run.wait() == 0, (tmp_path / "out").read_text()[-3000:]
    assert len(found) > 3, "no process of the run was found"
    beyond = {place: name for place, name in found.items() if not is_loopback(place[0])}
    assert beyond == {}


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
