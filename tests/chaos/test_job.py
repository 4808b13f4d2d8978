"""A run as `ray job submit` starts it, on a cluster that wants a token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from runs import command, user_rows, write_rows

import pipelines
from ptuning.system.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    """A cluster's head with a job server, both on loopback."""

    environment: dict[str, str]
    jobs: str

    def submit(self, *arguments: str, token: str | None = None) -> tuple[int, str]:
        """The exit code and output of `ray job submit -- ARGUMENTS`."""
        environment = self.environment | ({"RAY_AUTH_TOKEN": token} if token else {})
        done = subprocess.run(
            [RAY, "job", "submit", "--address", self.jobs, "--", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Started with `--block`, so that its processes are ours. A Ray that a job starts for itself
    would lie in the folder RAY_TMPDIR."""
    folder = tempfile.mkdtemp(prefix="ray-head-")  # short: it is part of socket names
    port, jobs = free_port(), free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": f"{folder}/own",
        "PYTHONPATH": str(Path(pipelines.__file__).parents[1]),
    }
    arguments = [
        *(RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={jobs}", "--num-cpus=2"),
        f"--dashboard-agent-listen-port={free_port()}",
        *(f"--temp-dir={folder}", "--object-store-memory=100000000"),
    ]
    with (Path(folder) / "log").open("wb") as log:
        process = subprocess.Popen(arguments, env=environment, stdout=log, stderr=log)
    head = Head(environment, f"http://127.0.0.1:{jobs}")
    try:
        _wait_until_ready(head, process, Path(folder) / "log")
        yield head
    finally:
        for started in [*psutil.Process(process.pid).children(recursive=True), process]:
            started.kill()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    end, said = time.monotonic() + 120, ""
    while process.poll() is None and time.monotonic() < end:
        code, said = head.submit("true")
        if code == 0:
            return
        time.sleep(1)
    pytest.fail(f"the head did not start: {said[-1000:]} {log.read_text()[-3000:]}")


def test_a_submitted_run_trains_on_the_cluster(
    head: Head, tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", user_rows("ann", 10) + user_rows("bob", 12))
    store = tmp_path / "store"
    code, output = head.submit(*command(data, store, tiny_model_dir, "train.epochs=1"))
    assert code == 0, output
    (summary,) = [json.loads(path.read_text()) for path in store.glob("runs/*/summary.json")]
    assert summary["users"]["trained"] == 2
    assert not Path(head.environment["RAY_TMPDIR"]).exists(), "it started a Ray of its own"


def test_a_store_in_the_jobs_own_folder_is_refused(
    head: Head, tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", user_rows("ann", 10))
    code, output = head.submit(*command(data, Path("store"), tiny_model_dir))
    assert code != 0
    assert "a job's store and data need absolute paths" in output


def test_without_the_clusters_token_nothing_is_submitted(head: Head) -> None:
    code, output = head.submit("true", token=secrets.token_hex(32))
    assert code != 0
    assert "succeeded" not in output
