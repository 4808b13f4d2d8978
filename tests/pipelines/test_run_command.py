"""`ptuning run` as a person uses it: in a project, with relative paths, output to a log."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import settings, user_rows, users_of, write_rows
from tiny_model import save_model
from waiting import wait_until

from ptuning.system.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
STRANGERS = ("serve.py", "torch.py", "json.py", "mlflow.py", "logging.py", "ptuning.py", "rows.py")
USERS = {"ann": 10, "bob": 11}

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class TypedCommand:
    """A finished command, and the project directory in which it ran."""

    project: Path
    out: str
    err: str
    code: int


def command(*arguments: str, project: Path) -> TypedCommand:
    """Run the `ptuning` command in a separate Ray cluster, with its output in a pipe."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON"))}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ptuning")), *arguments],
        cwd=project,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    return TypedCommand(project, done.stdout, done.stderr, done.returncode)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> TypedCommand:
    """A run in a project whose files have the names of our packages and of libraries."""
    project = tmp_path_factory.mktemp("project")
    save_model(project / "model")
    write_rows(
        project / "rows.jsonl", [row for user, n in USERS.items() for row in user_rows(user, n)]
    )
    for name in STRANGERS:
        (project / name).write_text("raise SystemExit('a stranger was imported')\n")
    (project / "pipelines").mkdir()
    (project / "pipelines" / "__init__.py").write_text("x = 1\n")
    sets = [
        part for one in settings(Path("./model"), "gate.min_gain=-10") for part in ("--set", one)
    ]
    return command("run", "--data", "rows.jsonl", "--store", "store", *sets, project=project)


def as_options(model: str, *more: str) -> list[str]:
    """The options of a small run."""
    return [part for setting in settings(Path(model), *more) for part in ("--set", setting)]


def test_a_run_works_beside_files_with_the_names_of_our_packages_and_of_libraries(
    ran: TypedCommand,
) -> None:
    assert ran.code == 0, ran.out + ran.err


def test_a_relative_model_works_in_workers_that_live_elsewhere(ran: TypedCommand) -> None:
    assert "2 promoted" in ran.out, ran.out + ran.err


HEADS = """partition: |tune: |register: |note: |Run |users  |trained  |unchanged  |too few  |
failed  |total  |loss, nats |base model  |another user's prefix  |own prefix  |own beats |time  |
start  |partition  |plan  |tune  |evaluate  |register  |deploy  |answer as these users: |
ask as one of them: |models and metrics: |this report: """.replace("\n", "").split("|")


def test_a_runs_log_has_our_own_lines_only(ran: TypedCommand) -> None:
    assert ran.err == ""
    lines = [line for line in ran.out.splitlines() if line.strip()]
    strange = [line for line in lines if not line.startswith(tuple(HEADS))]
    assert strange == []


def test_a_runs_log_counts_users_and_says_how_the_input_was_taken(ran: TypedCommand) -> None:
    assert "tune: 2 of 2 users" in ran.out
    assert "register: 2 of 2 users" in ran.out
    assert "note: the input was added to what was delivered before (0 other files)" in ran.out


def test_the_printed_command_answers_as_a_trained_user(ran: TypedCommand) -> None:
    (line,) = [line for line in ran.out.splitlines() if line.startswith("ask as one of them: ")]
    printed = line.removeprefix("ask as one of them: ").replace("--user ID", "--user ann")
    done = subprocess.run(
        printed.replace("ptuning", str(Path(sys.executable).with_name("ptuning")), 1),
        shell=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run_id = re.search(r"Run (\S+)", ran.out)[1]  # type: ignore[index]
    digests = {row["user_id"]: row["digest"] for row in users_of(ran.project / "store", run_id)}
    assert digests["ann"][:12] in done.stderr


def test_a_store_that_was_moved_answers_and_runs_without_training(
    ran: TypedCommand, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(ran.project / "store", moved)
    hidden = ran.project / "store-away"
    (ran.project / "store").rename(hidden)
    try:
        sets = as_options("model", "gate.min_gain=-10")
        asked = command(
            "generate", "--user", "bob", "--store", str(moved), *sets, "say it", project=ran.project
        )
        assert asked.code == 0, asked.err
        assert "prefix default version 1" in asked.err
        again = command(
            "run", "--data", "rows.jsonl", "--store", str(moved), *sets, project=ran.project
        )
        assert again.code == 0, again.err
        assert re.search(r"unchanged +2", again.out), again.out
    finally:
        hidden.rename(ran.project / "store")


def test_a_registry_that_is_not_there_is_found_before_a_row_is_read(ran: TypedCommand) -> None:
    sets = as_options("model")
    uri = "registry.uri=http://127.0.0.1:9"
    done = command(
        "run", "--data", "rows.jsonl", "--store", "new", *sets, "--set", uri, project=ran.project
    )
    assert done.code == 1
    assert "registry" in done.err
    assert done.err.count("\n") == 1, done.err
    assert "partition" not in done.out
    assert not (ran.project / "new" / "partitions").exists()


def test_a_service_starts_beside_files_with_the_names_of_our_packages(
    ran: TypedCommand, tmp_path: Path
) -> None:
    port, log = free_port(), tmp_path / "log"
    arguments = ["serve", "--store", "store", "--port", str(port), *as_options("model")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON"))}
    with log.open("wb") as output:
        service = subprocess.Popen(
            [str(Path(sys.executable).with_name("ptuning")), *arguments],
            cwd=ran.project,
            env={**environment, "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(
            lambda: service.poll() is not None or f"127.0.0.1:{port}" in log.read_text(), 250
        )
        assert service.poll() is None, log.read_text()[-2000:]
    finally:
        service.send_signal(signal.SIGINT)
        try:
            service.wait(60)
        except subprocess.TimeoutExpired:
            service.kill()
