"""The command line teaches, and its exit codes are a contract."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.cli import main


def _exit_code(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


def test_help_lists_the_verbs_that_exist_and_gives_examples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _exit_code(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in ("run", "generate", "serve", "status"):
        assert f"ptuning {verb}" in text
    for verb in ("rollback", "forget", "migrate"):
        assert verb not in text


def test_help_of_run_describes_every_configuration_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["run", "--help"]) == 0
    text = capsys.readouterr().out
    for key in ("data.max_rows", "method.num_virtual_tokens", "train.epochs", "gate.min_gain"):
        assert key in text


def test_help_comes_without_importing_torch_ray_or_mlflow() -> None:
    code = (
        "import sys; from pipelines.cli import cli; "
        "cli.main(['--help'], standalone_mode=False); "
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


def test_status_of_an_empty_store_says_how_to_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(["status", "--store", str(tmp_path)]) == 0
    assert "ptuning run" in capsys.readouterr().out
