"""`ptuning run` as a person types it: in their project, with relative paths, into a log. Then
`ptuning serve` on its store, asked with the official OpenAI client."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from asking import answered_digest, client_of
from listening import Listeners, watch_listeners
from runs import config_of, settings, user_rows, users_of, write_rows
from tiny_model import save_model
from waiting import wait_until

from pipelines.cli import main
from pipelines.report.progress import RunProgress
from pipelines.run import execute
from ptuning.store import Store
from ptuning.system.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
STRANGERS = ("serve.py", "torch.py", "json.py", "mlflow.py", "logging.py", "ptuning.py", "rows.py")
USERS = {"ann": 10, "bob": 11, "cy": 10, "few": 3}
TRAINED = ("ann", "bob", "cy")
# Two workers with a pack each.
PACKS = ("ray.workers=2", "train.pack_users=2")
ALWAYS = "gate.min_gain=-10"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class TypedCommand:
    """A finished command, and the project directory in which it ran."""

    project: Path
    out: str
    err: str
    code: int
    listeners: Listeners

    @property
    def run_id(self) -> str:
        return str(re.search(r"Run (\S+)", self.out)[1])  # type: ignore[index]


def command(*arguments: str, project: Path) -> TypedCommand:
    """Run the `ptuning` command in a separate Ray cluster, with its output in a pipe."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON"))}
    with watch_listeners() as listeners:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("ptuning")), *arguments],
            cwd=project,
            env={**environment, "PYTHONPATH": str(ROOT), **listeners.environment},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    return TypedCommand(project, done.stdout, done.stderr, done.returncode, listeners)


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
    sets = as_options("./model", ALWAYS, *PACKS)
    return command("run", "--data", "rows.jsonl", "--store", "store", *sets, project=project)


def as_options(model: str | Path, *more: str) -> list[str]:
    """The settings of a small run, as they are typed."""
    return [part for setting in settings(Path(model), *more) for part in ("--set", setting)]


def test_a_run_works_beside_files_with_the_names_of_our_packages_and_of_libraries(
    ran: TypedCommand,
) -> None:
    assert ran.code == 0, ran.out + ran.err


def test_a_relative_model_works_in_workers_that_live_elsewhere(ran: TypedCommand) -> None:
    assert "3 promoted" in ran.out, ran.out + ran.err


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
    assert "tune: 3 of 3 users" in ran.out
    assert "register: 3 of 3 users" in ran.out
    assert "note: the input was added to what was delivered before (0 other files)" in ran.out


def test_no_port_of_the_run_was_open_beyond_loopback(ran: TypedCommand) -> None:
    ran.listeners.check_loopback()


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
    digests = {row["user_id"]: row["digest"] for row in users_of(ran.project / "store", ran.run_id)}
    assert digests["ann"][:12] in done.stderr


@pytest.mark.usefixtures("ray_session")
def test_a_store_that_was_moved_answers_and_runs_without_training(
    ran: TypedCommand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(ran.project / "store", moved)
    hidden = ran.project / "store-away"
    (ran.project / "store").rename(hidden)
    place = ["--store", str(moved), *as_options(ran.project / "model", ALWAYS)]
    try:
        with pytest.raises(SystemExit) as stopped:
            main(["generate", "--user", "bob", *place, "say it"])
        asked = capsys.readouterr()
        assert stopped.value.code == 0, asked.err
        assert "prefix default version 1" in asked.err
        with pytest.raises(SystemExit) as stopped:
            main(["run", "--data", str(ran.project / "rows.jsonl"), *place])
        again = capsys.readouterr()
        assert stopped.value.code == 0, again.err
        assert re.search(r"unchanged +3", again.out), again.out
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


@pytest.fixture(scope="module")
def served(ran: TypedCommand) -> Iterator[str]:
    """The address of `ptuning serve` on the run's store, typed beside the same files."""
    port, log = free_port(), ran.project / "serve.log"
    arguments = ["serve", "--store", "store", "--port", str(port), *as_options("model")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON"))}
    with log.open("wb") as output:
        service = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("ptuning")),
                *arguments,
                *("--set", "serve.refresh_seconds=1"),
            ],
            cwd=ran.project,
            env={**environment, "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until(
            lambda: service.poll() is not None or address in log.read_text(), 250, every_s=0.2
        )
        assert service.poll() is None, log.read_text()[-2000:]
        yield address
    finally:
        service.send_signal(signal.SIGINT)
        try:
            service.wait(60)
        except subprocess.TimeoutExpired:
            service.kill()


def test_a_service_starts_beside_files_with_the_names_of_our_packages(served: str) -> None:
    assert served


def test_everybody_is_answered_with_the_prefix_that_the_run_made_for_them(
    ran: TypedCommand, served: str
) -> None:
    users = {row["user_id"]: row["digest"] for row in users_of(ran.project / "store", ran.run_id)}
    client = client_of(served)
    asked = [*USERS, "nobody"] * 4
    with ThreadPoolExecutor(len(asked)) as pool:
        digests = list(pool.map(lambda user: answered_digest(client, user), asked))
    for user, digest in zip(asked, digests, strict=True):
        assert digest == (users[user] if user in TRAINED else "base"), user


@pytest.mark.usefixtures("ray_session")
def test_new_rows_reach_the_running_service_as_a_new_prefix(
    ran: TypedCommand, served: str, tmp_path: Path
) -> None:
    """The last test of the store: it changes it."""
    store = ran.project / "store"
    before = {row["user_id"]: row for row in users_of(store, ran.run_id)}
    data = write_rows(tmp_path / "more.jsonl", user_rows("bob", 4, 7))
    with RunProgress() as progress:
        config = config_of(ran.project / "model", ALWAYS, *PACKS)
        facts = execute([str(data)], Store(store), config, progress)
    after = {row["user_id"]: row for row in users_of(store, facts.run_id)}
    assert after["ann"]["status"] == "unchanged"
    assert after["bob"]["digest"] != before["bob"]["digest"]
    client = client_of(served)
    wait_until(lambda: answered_digest(client, "bob") == after["bob"]["digest"], 60, every_s=0.2)
    assert answered_digest(client, "ann") == before["ann"]["digest"]
