"""From a user to the prefix that answers: published list, files, cache, refusals."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from serving import Files, kv_of, prefix_file
from tiny_backbones import as_layers

from ptuning.champions import ChampionList, ChampionRef, Name, publish
from ptuning.model.backbone import Backbone
from ptuning.prefix.artifact import Prefix, make_prefix
from ptuning.types import user_key
from serve.config import ServeConfig
from serve.engine.engine import HeldPrefix
from serve.events import Refused
from serve.metrics import Metrics
from serve.prefix_cache import PrefixCache, file_loader

T = TypeVar("T")
ALICE, BOB = user_key("alice"), user_key("bob")


class World:
    """A store, the list of its champions, and the cache under test."""

    def __init__(self, backbone: Backbone, directory: Path, **settings: Any) -> None:
        self.backbone = backbone
        self.files = Files(directory)
        self.metrics = Metrics()
        self.reads: list[str] = []
        self.config = ServeConfig(**settings)
        self.champions = ChampionList(self.files.store, backbone.fingerprint)
        load = file_loader(backbone, self.files.store)

        def counted(name: Name, champion: ChampionRef) -> HeldPrefix:
            self.reads.append(name[0])
            return load(name, champion)

        self.cache = PrefixCache(self.champions, counted, self.config, metrics=self.metrics)

    def publish(self, prefix: Prefix, **lies: str) -> ChampionRef:
        ref = self.files.promote(prefix, **lies)
        self.champions.refresh()
        return ref

    def promote(self, user: str, **settings: Any) -> Prefix:
        prefix = prefix_file(self.backbone, user, **settings)
        self.publish(prefix)
        return prefix

    def count(self, name: str) -> float:
        return self.metrics.snapshot({}, [name]).values[(name, ())]


@pytest.fixture
def world(backbone: Backbone, tmp_path: Path) -> World:
    return World(backbone, tmp_path)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 30))


def expect_refusal(work: Coroutine[Any, Any, Any]) -> Refused:
    with pytest.raises(Refused) as caught:
        run(work)
    return caught.value


def test_a_user_gets_the_champion_and_who_it_is(world: World) -> None:
    prefix = world.promote("alice", length=7)
    held = run(world.cache.get(ALICE, "default"))
    assert held is not None
    assert (held.info.name, held.info.version, held.info.digest) == ("default", "1", prefix.digest)
    assert held.ready.length == 7
    held_kv = kv_of(held)
    assert held_kv is not None
    assert torch.equal(held_kv, as_layers(prefix.tensors))


def test_a_user_without_champion_has_none(world: World) -> None:
    world.promote("alice")
    assert run(world.cache.get(BOB, "default")) is None
    assert run(world.cache.get(ALICE, "work")) is None


def test_a_users_named_prefixes_are_kept_apart(world: World) -> None:
    first = world.promote("alice", seed=1)
    second = world.promote("alice", seed=2, name="work")

    async def both() -> list[str]:
        names = ("default", "work")
        return [(await world.cache.get(ALICE, name)).info.digest for name in names]  # type: ignore[union-attr]

    assert run(both()) == [first.digest, second.digest]


def test_a_second_request_reads_nothing(world: World) -> None:
    world.promote("alice")

    async def twice() -> None:
        for _ in range(2):
            await world.cache.get(ALICE, "default")

    run(twice())
    assert len(world.reads) == 1
    assert world.count("ptuning_prefix_cache_hits_total") == 1
    assert world.count("ptuning_prefix_cache_misses_total") == 1


def test_a_new_champion_answers_once_the_list_is_read_again(world: World) -> None:
    old = world.promote("alice", seed=1)
    new = prefix_file(world.backbone, "alice", seed=2)

    async def digest() -> str:
        held = await world.cache.get(ALICE, "default")
        assert held is not None
        return held.info.digest

    async def story() -> list[str]:
        digests = [await digest()]
        world.files.promote(new)
        digests.append(await digest())
        world.champions.refresh()
        return [*digests, await digest()]

    assert run(story()) == [old.digest, old.digest, new.digest]


def test_a_run_on_another_backbone_never_touches_the_live_service(world: World) -> None:
    """Such a run used to turn every promoted user's answer into an error."""
    mine = world.promote("alice")
    other = replace(mine.meta, backbone_fingerprint="f" * 64, user_key=ALICE)
    for user in (ALICE, BOB):
        world.files.promote(make_prefix(mine.members, replace(other, user_key=user)))
    world.champions.refresh()

    async def story() -> None:
        held = await world.cache.get(ALICE, "default")
        assert held is not None
        assert held.info.digest == mine.digest
        assert await world.cache.get(BOB, "default") is None

    run(story())


def test_a_moved_store_answers_with_the_same_champions(
    world: World, backbone: Backbone, tmp_path: Path
) -> None:
    prefix = world.promote("alice")
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    shutil.move(world.files.store.root, moved)
    again = World(backbone, moved)
    again.champions.refresh()
    held = run(again.cache.get(ALICE, "default"))
    assert held is not None
    assert held.info.digest == prefix.digest


def test_another_users_file_is_refused(world: World) -> None:
    alices, bobs = (prefix_file(world.backbone, user) for user in ("alice", "bob"))
    world.publish(alices)
    world.files.path(alices).write_bytes(bobs.to_bytes())  # swapped on disk: the digest differs
    error = expect_refusal(world.cache.get(ALICE, "default"))
    assert error.fields["status"] == 500
    assert error.fields["code"] == "prefix_unusable"

    world.publish(bobs, as_user=ALICE)  # the list is wrong, but the file names its user
    error = expect_refusal(world.cache.get(ALICE, "default"))
    assert error.fields["code"] == "prefix_unusable"
    assert "another user" in error.message


def test_a_file_of_another_name_or_backbone_is_refused(world: World) -> None:
    world.publish(prefix_file(world.backbone, "alice", name="work"), as_name="default")
    assert expect_refusal(world.cache.get(ALICE, "default")).fields["code"] == "prefix_unusable"
    prefix = prefix_file(world.backbone, "bob")
    stranger = make_prefix(prefix.members, replace(prefix.meta, backbone_fingerprint="f" * 64))
    stranger.save(world.files.path(stranger))
    changes = {(BOB, "default"): ChampionRef(stranger.digest, "1")}  # the list errs
    publish(world.files.store, world.backbone.fingerprint, changes)
    world.champions.refresh()
    assert expect_refusal(world.cache.get(BOB, "default")).fields["code"] == "prefix_unusable"


def test_a_missing_file_is_a_503_and_is_tried_again(world: World) -> None:
    prefix = world.promote("alice")
    path = world.files.path(prefix)
    path.unlink()
    error = expect_refusal(world.cache.get(ALICE, "default"))
    assert error.fields["status"] == 503
    path.write_bytes(prefix.to_bytes())
    assert run(world.cache.get(ALICE, "default")) is not None


def test_concurrent_requests_of_one_user_load_once_and_one_that_leaves_disturbs_nobody(
    world: World,
) -> None:
    world.promote("alice")

    async def story() -> list[Any]:
        tasks = [asyncio.create_task(world.cache.get(ALICE, "default")) for _ in range(8)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = run(story())
    assert isinstance(results[0], asyncio.CancelledError)
    assert len({id(result) for result in results[1:]}) == 1
    assert len(world.reads) == 1


def test_the_least_recently_used_prefix_goes_first(backbone: Backbone, tmp_path: Path) -> None:
    world = World(backbone, tmp_path, prefix_cache_mb=1)
    size = as_layers(prefix_file(backbone, "a", length=200).tensors).numel() * 4
    room = 1_000_000 // size
    users = [f"user {number}" for number in range(room + 1)]
    for number, user in enumerate(users):
        world.promote(user, length=200, seed=number)
    *fitting, last = users
    first, second = fitting[:2]

    async def story() -> None:
        for user in (*fitting, first, last, first, second):
            await world.cache.get(user_key(user), "default")

    run(story())
    assert world.reads == [user_key(user) for user in (*fitting, last, second)]
    assert world.cache.nbytes == room * size


def test_a_prefix_larger_than_the_cache_is_served_and_not_kept(
    backbone: Backbone, tmp_path: Path
) -> None:
    world = World(backbone, tmp_path, prefix_cache_mb=0)
    world.promote("alice")
    assert run(world.cache.get(ALICE, "default")) is not None
    assert world.cache.nbytes == 0
