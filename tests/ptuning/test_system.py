"""Environment variables, atomic files, redaction, and the import path."""

from __future__ import annotations

import ast
import errno
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.config import load_config
from ptuning.system import environment
from ptuning.system.files import sweep_attempts, write_atomic, write_new
from ptuning.system.redaction import hide_passwords, hide_user

ROOT = Path(__file__).resolve().parents[2]


def test_environment_variables_are_decided_in_one_module() -> None:
    wrong = []
    for package in ("ptuning", "pipelines", "serve", "infra"):
        for file in sorted((ROOT / package).rglob("*.py")):
            if file.name == "environment.py":
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                    "environ.setdefault"
                ):
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    environment.set_defaults()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
    assert os.environ["DO_NOT_TRACK"] == "true"


def test_a_library_that_warns_while_it_is_imported_is_not_heard() -> None:
    """DeepSpeed sets its level and prints to standard output, before anybody can ask it not to."""
    code = """
        import logging, sys
        from ptuning.system import environment
        environment.silence_libraries(terminal=False)
        library = logging.getLogger("DeepSpeed")
        library.addHandler(logging.StreamHandler(sys.stdout))
        library.setLevel(logging.WARNING)
        library.warning("setting the accelerator")
        library.error("broken")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "broken\n"


def test_a_neutral_directory_is_empty_and_left_again() -> None:
    before = Path.cwd()
    with environment.neutral_directory():
        assert Path.cwd() != before
        assert list(Path.cwd().iterdir()) == []
    assert Path.cwd() == before


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("postgresql://me:hunter2@db:5432/mlflow", "postgresql://me:***@db:5432/mlflow"),
        ("postgresql+psycopg2://me:hunter2@x@db/x", "postgresql+psycopg2://me:***@db/x"),
        ("https://:hunter2@host", "https://:***@host"),
        ("at http://a:hunter2@b and http://c:hunter2@d", "at http://a:***@b and http://c:***@d"),
        ("postgresql://db/x?user=me&password=hunter2&a=1", None),
        ("http://me@host:80/a:b@c", "http://me@host:80/a:b@c"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
    ],
)
def test_no_form_of_address_shows_its_password(text: str, hidden: str | None) -> None:
    assert "hunter2" not in hide_passwords(text)
    if hidden is not None:
        assert hide_passwords(text) == hidden
    assert hide_passwords(hide_passwords(text)) == hide_passwords(text)


def test_an_error_loses_the_users_id_but_keeps_its_words() -> None:
    assert hide_user("bad row of a@b.c: a word", "a@b.c") == "bad row of <user>: a word"
    assert hide_user("a word in a hat", "at") == "a word in a hat"
    assert hide_user("a word in a hat", "") == "a word in a hat"
    assert hide_user("seen: 'x\\ny'", "x\ny") == "seen: '<user>'"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    write_atomic(target, b"one")
    write_atomic(target, b"two")
    assert target.read_bytes() == b"two"
    (tmp_path / "folder" / "x").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomic(tmp_path / "folder", b"three")
    assert not list(tmp_path.rglob("*.tmp"))


def test_files_of_dead_writers_are_swept_and_others_left_alone(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, now = socket.gethostname(), int(time.time())
    names = {
        "dead": f"{now}-{dead.pid}-{'a' * 32}-{host}.tmp",
        "living": f"{now}-{os.getpid()}-{'b' * 32}-{host}.tmp",
        "elsewhere": f"{now}-{dead.pid}-{'c' * 32}-another.tmp",
        "long ago": f"{now - 100_000}-1-{'d' * 32}-another.tmp",
        "a stranger's": "x.tmp",
    }
    for name in names.values():
        (tmp_path / name).write_bytes(b"half")
    sweep_attempts(tmp_path)
    left = {what for what, name in names.items() if (tmp_path / name).exists()}
    assert left == {"living", "elsewhere", "a stranger's"}
    sweep_attempts(tmp_path / "nothing")


@pytest.mark.parametrize("write", [write_atomic, write_new])
def test_a_folder_on_another_volume_is_written_too(
    write: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def across(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    rename = os.rename
    monkeypatch.setattr(os, "replace", across)
    monkeypatch.setattr(os, "link", across)
    write(tmp_path / "volume" / "x", b"one", tmp_path / "attempts")
    assert (tmp_path / "volume" / "x").read_bytes() == b"one"
    assert not list(tmp_path.rglob("*.tmp"))


def _race(target: str, name: bytes, start, won) -> None:  # type: ignore[no-untyped-def]
    start.wait(60)
    for n in range(50):
        if write_new(f"{target}-{n}", name):
            won.put((n, name))


def test_of_processes_that_race_for_a_name_exactly_one_writes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, won = context.Barrier(3), context.Queue()
    racers = [
        context.Process(target=_race, args=(str(tmp_path / "f"), name, start, won))
        for name in (b"one", b"two", b"three")
    ]
    for racer in racers:
        racer.start()
    written = dict(won.get(timeout=60) for _ in range(50))
    for racer in racers:
        racer.join(60)
    assert sorted(written) == list(range(50))
    assert won.empty()
    for n, name in written.items():
        assert (tmp_path / f"f-{n}").read_bytes() == name
    assert not list(tmp_path.glob("*.tmp"))


def test_the_module_command_leaves_the_working_directory_off_the_path(tmp_path: Path) -> None:
    """The working directory may contain files with the names of libraries."""
    for name in ("click.py", "rich.py", "torch.py", "json.py", "yaml.py", "pydantic.py", "ray.py"):
        (tmp_path / name).write_text("raise SystemExit('a stranger was imported')\n")
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "run", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "train.epochs" in done.stdout


def test_every_variable_of_ours_that_the_code_reads_is_known() -> None:
    """`ptuning run` refuses any other PTUNING_ variable as a mistyped setting."""
    root = Path(__file__).resolve().parents[2]
    named = {
        name
        for package in ("ptuning", "pipelines", "serve", "infra")
        for file in (root / package).rglob("*.py")
        for name in re.findall(r"\bPTUNING_[A-Z_]*[A-Z]\b", file.read_text(encoding="utf-8"))
        if "__" not in name
    }
    assert named == environment.VARIABLES
    assert load_config(None, [], dict.fromkeys(environment.VARIABLES, "x"))
