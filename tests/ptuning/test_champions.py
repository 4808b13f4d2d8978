"""Published champions: what readers see, even if publishers race or die."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptuning import champions
from ptuning.champions import (
    ChampionList,
    ChampionRef,
    acknowledge,
    publish,
    wait_acknowledged,
    withdraw,
)
from ptuning.errors import RunError
from ptuning.store import Store
from ptuning.types import user_key

BACKBONE, OTHER = "a" * 64, "b" * 64


def ref(number: int) -> ChampionRef:
    return ChampionRef(f"{number + 1:064x}", str(number))


def name(user: object, prefix_name: str = "default") -> tuple[str, str]:
    return user_key(str(user)), prefix_name


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def read_champions(store: Store, backbone: str = BACKBONE) -> ChampionList:
    found = ChampionList(store, backbone)
    found.refresh()
    return found


def test_a_user_has_the_champion_that_was_published_last(store: Store) -> None:
    reader = read_champions(store)
    assert (reader.generation, reader.get(*name("ann"))) == (0, None)
    assert publish(store, BACKBONE, {name("ann"): ref(1), name("bob"): ref(2)}) == 1
    assert publish(store, BACKBONE, {name("ann"): ref(3)}) == 2
    assert reader.get(*name("ann")) is None, "nothing is read before the first refresh"
    assert reader.refresh() == 2
    for champions_now in (reader, read_champions(store)):
        assert champions_now.get(*name("ann")) == ref(3)
        assert champions_now.get(*name("bob")) == ref(2)
        assert champions_now.get(*name("cy")) is None
        assert champions_now.get(*name("ann", "work")) is None


def test_a_user_who_was_removed_has_none(store: Store) -> None:
    publish(store, BACKBONE, {name("ann"): ref(1), name("ann", "work"): ref(2)})
    publish(store, BACKBONE, {name("ann"): None})
    assert dict(read_champions(store).items()) == {name("ann", "work"): ref(2)}


def test_one_backbone_never_sees_anothers_champions(store: Store) -> None:
    publish(store, BACKBONE, {name("ann"): ref(1)})
    publish(store, OTHER, {name("ann"): ref(2)})
    assert read_champions(store).get(*name("ann")) == ref(1)
    assert read_champions(store, OTHER).get(*name("ann")) == ref(2)


def test_backbones_that_begin_alike_are_told_apart(store: Store) -> None:
    """The folder's name has only the first eight digits of the fingerprint."""
    publish(store, BACKBONE, {name("ann"): ref(1)})
    alike = BACKBONE[:8] + "c" * 56
    with pytest.raises(RunError, match="backbone"):
        read_champions(store, alike)
    with pytest.raises(RunError, match="backbone"):
        publish(store, alike, {name("ann"): ref(2)})


def test_publishing_nothing_makes_no_generation(store: Store) -> None:
    assert publish(store, BACKBONE, {}) == 0
    publish(store, BACKBONE, {name("ann"): ref(1)})
    assert publish(store, BACKBONE, {}) == 1


_changes = st.dictionaries(
    st.tuples(st.sampled_from([user_key(str(n)) for n in range(6)]), st.sampled_from(["a", "b"])),
    st.one_of(st.none(), st.integers(0, 99).map(ref)),
)


@given(st.lists(_changes, max_size=8), st.integers(1, 4), st.integers(1, 4))
def test_any_history_reads_as_a_dictionary_would(
    tmp_path_factory: pytest.TempPathFactory,
    history: list[dict[tuple[str, str], ChampionRef | None]],
    min_full: int,
    max_deltas: int,
) -> None:
    """Whichever generations are deltas or full lists, and whatever the reader knew before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(champions, "_MIN_FULL", min_full)
        patch.setattr(champions, "_MAX_DELTAS", max_deltas)
        store = Store(tmp_path_factory.mktemp("history"))
        wanted: dict[tuple[str, str], ChampionRef] = {}
        reader = read_champions(store)
        for number, changes in enumerate(history):
            publish(store, BACKBONE, changes)
            wanted = {key: value for key, value in (wanted | changes).items() if value is not None}
            if number % 2:
                reader.refresh()
                assert dict(reader.items()) == wanted
        assert dict(read_champions(store).items()) == wanted
        for n in range(6):
            for prefix_name in ("a", "b"):
                assert read_champions(store).get(*name(n, prefix_name)) == wanted.get(
                    name(n, prefix_name)
                )


def _publish_many(root: str, worker: int, count: int) -> None:
    for n in range(count):
        publish(Store(root), BACKBONE, {name(f"{worker}-{n}"): ref(n)})


def test_concurrent_publishers_lose_nothing(store: Store) -> None:
    context: Any = multiprocessing.get_context("fork")
    workers = [context.Process(target=_publish_many, args=(store.root, n, 8)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    reader = read_champions(store)
    assert reader.generation == 32
    assert dict(reader.items()) == {name(f"{w}-{n}"): ref(n) for w in range(4) for n in range(8)}


def test_a_damaged_or_missing_generation_keeps_the_list_that_was_known(store: Store) -> None:
    publish(store, BACKBONE, {name("ann"): ref(1)})
    reader = read_champions(store)
    publish(store, BACKBONE, {name("ann"): ref(2)})
    folder = f"champions/{BACKBONE[:8]}"
    (delta,) = store.list(f"{folder}/00000002")
    whole = store.read(f"{folder}/00000002/{delta}")
    for broken in (whole[: len(whole) // 2], b"", None):
        if broken is None:
            store.remove(f"{folder}/00000002/{delta}")
        else:
            store.write(f"{folder}/00000002/{delta}", broken)
        with pytest.raises((RunError, OSError)):
            reader.refresh()
        assert (reader.generation, reader.get(*name("ann"))) == (1, ref(1))
    store.write(f"{folder}/00000002/{delta}", whole)
    assert reader.refresh() == 2
    store.write(f"{folder}/latest", b"{")
    with pytest.raises(RunError, match="latest"):
        reader.refresh()
    assert reader.get(*name("ann")) == ref(2)


def test_a_publisher_can_wait_for_the_replicas_and_names_late_ones(
    store: Store,
) -> None:
    assert wait_acknowledged(store, BACKBONE, 1, 0) == [], "no replica serves"
    acknowledge(store, BACKBONE, "quick", 2, 1)
    acknowledge(store, BACKBONE, "late", 1, 1)
    assert wait_acknowledged(store, BACKBONE, 2, 0.3, every_s=0.05) == ["late"]
    withdraw(store, BACKBONE, "late")
    assert wait_acknowledged(store, BACKBONE, 2, 0) == []
