"""The store: whole files or none, and one winner among concurrent writers."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from ptuning.errors import RunError
from ptuning.store import Store, prefix_path


@pytest.fixture(params=["local", "file-uri"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    roots = {
        "local": str(tmp_path / "store"),
        "file-uri": f"file://{tmp_path}/store",
    }
    return Store(roots[request.param])


def files_below(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_what_is_written_is_read_listed_and_there(store: Store) -> None:
    assert not store.exists("runs/a/plan.json")
    assert store.list("runs") == []
    store.write_json("runs/a/plan.json", {"b": 1, "a": "ü"})
    store.write("runs/a/other", b"\0\1")
    store.write("runs/b/other", b"")
    assert store.exists("runs/a/plan.json")
    assert store.list("runs") == ["a", "b"]
    assert store.list("runs/a") == ["other", "plan.json"]
    assert store.read_json("runs/a/plan.json") == {"a": "ü", "b": 1}
    assert store.read("runs/a/other") == b"\0\1"
    store.write("runs/a/other", b"new")
    assert store.read("runs/a/other") == b"new"


def test_a_root_is_one_place_however_it_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for root in ("store", "./store/", tmp_path / "store"):
        assert Store(root).root == str(tmp_path / "store")
    Store("store").write("x", b"1")
    assert Store(tmp_path / "store").read("x") == b"1"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store("~/store").read("x") == b"1"


def test_a_file_written_piece_by_piece_appears_whole_or_not_at_all(store: Store) -> None:
    with store.open_write("folder/table") as file:
        file.write(b"one ")
        assert not store.exists("folder/table")
        file.write(b"two")
    assert store.read("folder/table") == b"one two"

    def crash() -> None:
        with store.open_write("folder/table") as file:
            file.write(b"half")
            raise KeyError("a crash in the middle")

    with pytest.raises(KeyError):
        crash()
    assert store.read("folder/table") == b"one two"
    assert store.list("folder") == ["table"]


@pytest.mark.parametrize("failing", ["fsync", "replace", "link"])
def test_a_write_that_fails_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    store = Store(tmp_path / "store")
    store.write("a/x", b"old")

    def fail(*_args: Any) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, failing, fail)
    if failing != "link":
        with pytest.raises(OSError, match="no space"):
            store.write("a/x", b"new")
    if failing != "replace":
        with pytest.raises(OSError, match="no space"):
            store.write_once("a/y", 1)
    monkeypatch.undo()
    assert files_below(tmp_path / "store") == ["a/x"]
    assert store.read("a/x") == b"old"


def test_the_first_writer_of_a_record_wins(store: Store) -> None:
    assert store.write_once("done/pack.json", {"attempt": 1})
    assert not store.write_once("done/pack.json", {"attempt": 2})
    assert store.read_json("done/pack.json") == {"attempt": 1}
    assert store.list("done") == ["pack.json"]


def test_of_many_that_write_a_record_at_once_one_wins_and_says_so(tmp_path: Path) -> None:
    """Readers get what the winner wrote, never a mixture, and losers know that they lost."""
    store, threads, rounds = Store(tmp_path), 8, 12
    won: list[list[int]] = [[] for _ in range(rounds)]
    barrier = threading.Barrier(threads, timeout=60)

    def race(me: int) -> None:
        for n in range(rounds):
            barrier.wait()
            if store.write_once(f"done/{n}.json", {"writer": me, "filler": "x" * 5000}):
                won[n].append(me)

    workers = [threading.Thread(target=race, args=(me,)) for me in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    for n, winners in enumerate(won):
        assert len(winners) == 1
        assert store.read_json(f"done/{n}.json")["writer"] == winners[0]
    assert len(files_below(tmp_path)) == rounds, "temporary files were left behind"


def test_a_reader_beside_a_writer_sees_whole_files_only(tmp_path: Path) -> None:
    store, stop = Store(tmp_path), threading.Event()
    bodies = [bytes([n]) * 200_000 for n in range(4)]
    store.write("x", bodies[0])

    def write() -> None:
        for n in range(40):
            store.write("x", bodies[n % 4])
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not stop.is_set():
        assert store.read("x") in bodies
    writer.join(timeout=60)
    assert store.list("") == ["attempts", "x"]
    assert store.list("attempts") == []


def test_a_file_that_is_not_json_is_an_error_that_names_it(store: Store) -> None:
    for body in (b"{half", b"\xff\xfe"):
        store.write("runs/x.json", body)
        with pytest.raises(RunError, match=r"runs/x\.json"):
            store.read_json("runs/x.json")


def test_numbers_that_json_has_not_are_refused_before_anything_is_written(store: Store) -> None:
    for write in (store.write_json, store.write_once):
        with pytest.raises(ValueError):
            write("runs/x.json", {"loss": float("nan")})
    assert not store.exists("runs/x.json")


def test_a_file_that_is_not_there_is_file_not_found(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("nothing")
    with pytest.raises(FileNotFoundError):
        store.read_json("nothing")


def test_prefix_files_lie_where_the_design_says() -> None:
    assert prefix_path("abcdef", "0123") == "prefixes/ab/abcdef/0123.safetensors"
