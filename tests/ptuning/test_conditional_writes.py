"""Conditional writes: exactly one of racing processes wins, on disks and on a real S3 server."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from store_backends import make_bucket
from waiting import wait_until

from ptuning.champions import ChampionList, ChampionRef, publish
from ptuning.errors import ConfigError
from ptuning.store import Store

# New interpreters: an S3 client does not survive a fork.
_SPAWN: Any = multiprocessing.get_context("spawn")
WORKERS = 3


def race(work: Callable[..., None], root: str, *more: Any) -> None:
    workers = [_SPAWN.Process(target=work, args=(root, n, *more)) for n in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0


def _claim(root: str, me: int, names: int) -> None:
    store = Store(root)
    for n in range(names):
        if store.put_if_absent(f"claims/{n}", str(me).encode() * 2000):
            store.write(f"won/{n}-{me}", b"")


def _count(root: str, _me: int, times: int) -> None:
    store = Store(root)
    for _ in range(times):
        while True:
            found = store.read_versioned("counter")
            assert found is not None
            data, etag = found
            if store.replace_if_unchanged("counter", str(int(data) + 1).encode(), etag):
                break


def _is_replaced(store: Store, known: bytes) -> bool:
    return store.read("x") != known


def test_a_free_name_is_taken_once(place: Store) -> None:
    assert place.put_if_absent("a/x", b"first")
    assert not place.put_if_absent("a/x", b"second")
    assert place.read("a/x") == b"first"
    assert place.write_once("a/y", {"n": 1})
    assert not place.write_once("a/y", {"n": 2})
    assert place.read_json("a/y") == {"n": 1}


def test_a_file_is_replaced_only_by_who_has_read_what_is_there(place: Store) -> None:
    assert place.read_versioned("a/x") is None
    place.write("a/x", b"one")
    found = place.read_versioned("a/x")
    assert found is not None
    data, etag = found
    assert data == b"one"
    assert place.replace_if_unchanged("a/x", b"two", etag)
    assert not place.replace_if_unchanged("a/x", b"three", etag)
    assert place.read("a/x") == b"two"
    place.remove("a/x")
    assert not place.replace_if_unchanged("a/x", b"four", etag)
    assert not place.exists("a/x")


def test_of_processes_that_claim_names_one_wins_each(place: Store) -> None:
    race(_claim, place.root, 12)
    winners = dict(name.split("-") for name in place.list("won"))
    assert len(place.list("won")) == len(winners) == 12
    for n, winner in winners.items():
        assert place.read(f"claims/{n}") == winner.encode() * 2000


def test_no_update_of_a_counter_is_lost(place: Store) -> None:
    assert place.put_if_absent("counter", b"0")
    race(_count, place.root, 10)
    assert place.read("counter") == str(10 * WORKERS).encode()


def test_generations_are_published_on_every_kind_of_store(place: Store) -> None:
    name, ref = ("a" * 52, "default"), ChampionRef("ab" * 32, "1")
    assert publish(place, "f" * 64, {name: ref}) == 1
    reader = ChampionList(place, "f" * 64)
    assert reader.refresh() == 1
    assert reader.get(*name) == ref


def _replace_for_ever(root: str) -> None:
    store = Store(root)
    for n in range(10**9):
        found = store.read_versioned("x")
        assert found is not None
        store.replace_if_unchanged("x", str(n).encode() * 20_000, found[1])


def test_a_writer_that_is_killed_leaves_a_whole_file_and_no_lock(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("x", b"0")
    for _ in range(3):
        worker = _SPAWN.Process(target=_replace_for_ever, args=(store.root,))
        worker.start()
        before = store.read("x")
        wait_until(partial(_is_replaced, store, before), 60)
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(30)
        found = store.read_versioned("x")
        assert found is not None
        data, etag = found
        assert len(data) % 20_000 == 0, "the file must be whole"
        begun = time.monotonic()
        assert store.replace_if_unchanged("x", b"1" * 20_000, etag)
        assert time.monotonic() - begun < 5


def test_a_store_that_cannot_decide_races_is_refused() -> None:
    with pytest.raises(ConfigError, match="races") as caught:
        Store("memory://bucket/store").put_if_absent("a", b"")
    assert "s3://" in str(caught.value.expected)


@pytest.mark.parametrize("name", ["a::b", "a#b", "a b?c", "100%"])
def test_a_local_path_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / name)
    store.write("x", b"1")
    assert (tmp_path / name / "x").read_bytes() == b"1"
    assert store.read("x") == b"1"
    assert store.is_local
    assert store.put_if_absent("y", b"2")


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_not_made(s3_server: str) -> None:
    store = Store("s3://nobody-made-this-bucket/store")
    with pytest.raises(OSError):
        store.write("x", b"1")
    with pytest.raises(OSError):
        store.put_if_absent("y", b"1")
    import s3fs

    assert not s3fs.S3FileSystem(use_listings_cache=False).exists("nobody-made-this-bucket")


@pytest.mark.slow
def test_a_put_whose_answer_was_lost_counts_as_done(
    s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client repeats the put and is refused because of the object that it wrote."""
    store = Store(f"s3://{make_bucket()}/store")
    call = store.fs.call_s3

    def twice(method: str, *arguments: Any, **options: Any) -> Any:
        if method == "put_object" and ("IfMatch" in options or "IfNoneMatch" in options):
            call(method, *arguments, **options)
        return call(method, *arguments, **options)

    monkeypatch.setattr(store.fs, "call_s3", twice)
    for number in range(3):
        name = ("a" * 52, "default")
        assert publish(store, "f" * 64, {name: ChampionRef("ab" * 32, str(number))}) == number + 1
        reader = ChampionList(store, "f" * 64)
        reader.refresh()
        assert reader.get(*name) == ChampionRef("ab" * 32, str(number))


@pytest.mark.slow
def test_a_folders_marker_in_an_object_store_is_no_entry(s3_server: str) -> None:
    """Ray Train's storage, for one, puts an empty object `runs/` beside the runs."""
    import s3fs

    store = Store(f"s3://{make_bucket()}/store")
    store.write("runs/a/config.yaml", b"")
    bucket = store.root.removeprefix("s3://").split("/")[0]
    s3fs.S3FileSystem().call_s3("put_object", Bucket=bucket, Key="store/runs/", Body=b"")
    assert store.list("runs") == ["a"]
