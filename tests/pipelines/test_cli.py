"""The command line: help, errors and exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from rich.console import Console

from pipelines.cli import main, verbs
from pipelines.plan import Plan, PlannedUser, make_packs
from pipelines.report.status import print_status, run_states
from pipelines.run_folder import RunFolder
from ptuning.store import Store


def _exit_code(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


def test_help_lists_every_verb_and_gives_an_example_of_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _exit_code(["--help"]) == 0
    examples, listed = capsys.readouterr().out.split("Commands:")
    assert verbs.commands
    for verb, command in verbs.commands.items():
        assert f"ptuning {verb}" in examples, f"--help has no example of {verb}"
        assert f"  {verb} " in listed
        assert command.help, f"{verb} has no description"
    planned = {"key", "export", "rollback", "forget", "migrate", "gc", "doctor"}
    for verb in planned - set(verbs.commands):
        assert f"ptuning {verb}" not in examples, f"{verb} is not built"


def test_every_verb_explains_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, command in verbs.commands.items():
        assert _exit_code([verb, "--help"]) == 0
        text = capsys.readouterr().out
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{verb} {parameter.name} has no description"
                assert parameter.opts[0] in text


# How to call each verb without a store.
_WITHOUT_STORE = {
    "run": ["--data", "nowhere.jsonl"],
    "generate": ["--user", "ann", "hello"],
    "serve": [],
    "status": [],
}


def test_every_verb_says_what_is_missing_where_there_is_no_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every verb gets as far as opening the store. A mistyped path is a usage error."""
    assert _WITHOUT_STORE.keys() == verbs.commands.keys(), "add a call of the new verb above"
    for verb, arguments in _WITHOUT_STORE.items():
        code = _exit_code([verb, "--store", str(tmp_path / "typo"), *arguments])
        said = capsys.readouterr()
        assert code == (1 if verb == "run" else 2), (verb, said)
        assert "typo" in said.err or "nowhere.jsonl" in said.err, (verb, said)
    assert not (tmp_path / "typo").exists()


def test_help_of_run_describes_every_configuration_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["run", "--help"]) == 0
    text = capsys.readouterr().out
    for key in ("data.max_rows", "method.num_virtual_tokens", "train.epochs", "gate.min_gain"):
        assert key in text


def test_help_comes_without_importing_torch_ray_or_mlflow() -> None:
    code = (
        "import sys; from pipelines.cli import verbs; "
        "verbs.main(['--help'], standalone_mode=False); "
        "print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip().endswith("[]"), done.stdout
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["nonsense"],
        ["run", "--data", "x.jsonl", "--set", "train.epoch=3"],
        ["run", "--data", "x.jsonl", "--config", "missing.yaml"],
        ["generate", "hello"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert _exit_code(arguments) == 2


def test_status_of_a_store_that_is_not_there_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped path must not look like a store without runs."""
    assert _exit_code(["status", "--store", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "nothing") in error
    assert "ptuning run" in error
    assert not (tmp_path / "nothing").exists()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with a finished run, a stopped run, and one that has just begun."""
    store = Store(tmp_path)
    users = {"total": 1_234_567, "trained": 999_999, "promoted": 888_888, "failed": 12}
    summary = {"users": users, "nll": {"base": 12.3456, "candidate": 11.9876}}
    for name in ("20260101-000000-aaaa", "20260102-000000-bbbb", "20260103-000000-cccc"):
        RunFolder(store, name).write_config({"partition_id": "p"}, "data: {}\n")
    RunFolder(store, "20260101-000000-aaaa").write_summary(summary)
    stopped = RunFolder(store, "20260102-000000-bbbb")
    with stopped.lock():
        planned = [
            PlannedUser(user_key=f"u{n}", tokens=1, data_digest="", training_digest="")
            for n in range(4)
        ]
        stopped.write_plan(Plan(packs=make_packs(planned, 1, 1)))
    return store


def test_status_cuts_nothing_at_80_columns_and_tells_states_apart(store: Store) -> None:
    stream = io.StringIO()
    print_status(Console(file=stream, width=80), store.root, run_states(store))
    lines = stream.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 80
    finished, stopped, begun = lines[1:4]
    for text in ("20260101-000000-aaaa", "finished", "1235k", "1000k", "889k", "12.35→11.99"):
        assert text in finished
    assert "stopped 0 %" in stopped
    assert "unfinished" in begun


def test_status_for_programs_is_json(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(store, "20260103-000000-cccc").lock():
        assert _exit_code(["status", "--json", "--store", store.root]) == 0
    runs = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in runs] == ["finished", "stopped", "running"]
    assert runs[0]["summary"]["users"]["total"] == 1_234_567
    assert runs[1]["packs"] == {"done": 0, "total": 4}
