"""From a user to the prefix that answers: pointers, files, and a registry that is down."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from serving import Files, kv_of, prefix_file
from tiny_backbones import as_layers

from ptuning.errors import RegistryError
from ptuning.model.backbone import Backbone
from ptuning.prefix.artifact import Prefix, make_prefix
from ptuning.registry import MemoryRegistry, Version
from ptuning.types import user_key
from serve.config import ServeConfig
from serve.events import Refused
from serve.metrics import Metrics
from serve.prefix_cache import PrefixCache, file_loader

T = TypeVar("T")
ALICE, BOB = user_key("alice"), user_key("bob")


class World:
    """A registry, files, a clock that a test moves, and the cache under test."""

    def __init__(self, backbone: Backbone, directory: Path, **settings: Any) -> None:
        self.backbone = backbone
        self.registry = MemoryRegistry()
        self.files = Files(self.registry, directory)
        self.metrics = Metrics()
        self.now = 1000.0
        self.reads: list[str] = []
        self.config = ServeConfig(refresh_seconds=5, max_stale_seconds=60, **settings)
        self.cache = PrefixCache(
            self.registry,
            file_loader(backbone, self.read),
            self.config,
            metrics=self.metrics,
            clock=lambda: self.now,
        )

    def read(self, uri: str) -> bytes:
        self.reads.append(uri)
        return Path(uri).read_bytes()

    def promote(self, user: str, **settings: Any) -> Prefix:
        prefix = prefix_file(self.backbone, user, **settings)
        self.files.promote(prefix)
        return prefix

    def count(self, name: str) -> float:
        return self.metrics.snapshot({}, [name]).values[(name, ())]


@pytest.fixture
def world(backbone: Backbone, tmp_path: Path) -> World:
    return World(backbone, tmp_path)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 30))


def refusal(work: Coroutine[Any, Any, Any]) -> Refused:
    with pytest.raises(Refused) as caught:
        run(work)
    return caught.value


def test_a_user_gets_the_champion_and_who_it_is(world: World) -> None:
    prefix = world.promote("alice", length=7)
    held = run(world.cache.get(ALICE, "default"))
    assert held is not None
    assert (held.info.name, held.info.version, held.info.digest) == ("default", "1", prefix.digest)
    assert held.ready.length == 7
    assert kv_of(held) is not None
    assert torch.equal(kv_of(held), as_layers(prefix.tensors))


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


def test_a_new_champion_is_taken_up_after_refresh_seconds(world: World) -> None:
    old = world.promote("alice", seed=1)

    async def story() -> list[str]:
        seen = []
        for step in (0.0, 4.9, 0.2):
            world.now += step
            held = await world.cache.get(ALICE, "default")
            assert held is not None
            seen.append(held.info.digest)
            if step == 0.0:
                new = world.promote("alice", seed=2)
        return [*seen, new.digest]

    first, second, third, new_digest = run(story())
    assert first == second == old.digest
    assert third == new_digest != old.digest


def test_a_user_who_had_none_is_asked_about_again(world: World) -> None:
    async def story() -> bool:
        assert await world.cache.get(ALICE, "default") is None
        world.promote("alice")
        world.now += 6
        return await world.cache.get(ALICE, "default") is not None

    assert run(story())


def test_another_users_file_is_refused(world: World, tmp_path: Path) -> None:
    bobs = prefix_file(world.backbone, "bob")
    version = world.files.promote(prefix_file(world.backbone, "alice"))
    path = Path(version.uri)
    path.write_bytes(bobs.to_bytes())  # swapped on disk: the digest says so
    error = refusal(world.cache.get(ALICE, "default"))
    assert error.fields["status"] == 500
    assert error.fields["code"] == "prefix_unusable"

    world.files.promote(bobs, as_user=ALICE)  # the registry errs, the file knows
    world.now += 6
    error = refusal(world.cache.get(ALICE, "default"))
    assert error.fields["code"] == "prefix_unusable"
    assert "another user" in error.message


def test_a_file_of_another_name_or_backbone_is_refused(world: World) -> None:
    world.files.promote(prefix_file(world.backbone, "alice", name="work"), as_name="default")
    assert refusal(world.cache.get(ALICE, "default")).fields["code"] == "prefix_unusable"
    prefix = prefix_file(world.backbone, "bob")
    meta = replace(prefix.meta, backbone_fingerprint="other")
    world.files.promote(make_prefix(prefix.members, meta))
    assert refusal(world.cache.get(BOB, "default")).fields["code"] == "prefix_unusable"


def test_a_missing_file_is_a_503_and_is_tried_again(world: World) -> None:
    prefix = prefix_file(world.backbone, "alice")
    path = Path(world.files.promote(prefix).uri)
    path.unlink()
    error = refusal(world.cache.get(ALICE, "default"))
    assert error.fields["status"] == 503
    path.write_bytes(prefix.to_bytes())
    assert run(world.cache.get(ALICE, "default")) is not None


def test_while_the_registry_is_down_a_known_champion_answers_until_the_bound(world: World) -> None:
    prefix = world.promote("alice")

    async def digest() -> str:
        held = await world.cache.get(ALICE, "default")
        assert held is not None
        return held.info.digest

    async def story() -> None:
        await digest()
        world.registry.unreachable = True
        world.now += 59
        assert await digest() == prefix.digest
        world.now += 2
        with pytest.raises(Refused) as caught:
            await digest()
        assert caught.value.fields["status"] == 503
        world.registry.unreachable = False
        world.now += 5
        assert await digest() == prefix.digest

    run(story())
    assert world.count("ptuning_registry_errors_total") >= 1


def test_while_the_registry_is_down_nobody_silently_gets_the_base(world: World) -> None:
    async def story() -> None:
        assert await world.cache.get(ALICE, "default") is None  # known to have none, just now
        world.registry.unreachable = True
        for user in (ALICE, BOB):
            world.now += 6
            with pytest.raises(Refused) as caught:
                await world.cache.get(user, "default")
            assert caught.value.fields["code"] == "registry_unavailable"

    run(story())


def test_a_registry_that_hangs_costs_one_wait_and_no_more(
    backbone: Backbone, tmp_path: Path
) -> None:
    world = World(backbone, tmp_path, registry_timeout_s=0.05)
    world.promote("alice")
    answer = threading.Event()
    calls = []

    async def story() -> None:
        assert await world.cache.get(ALICE, "default") is not None
        champion = world.registry.champion

        def hang(user: str, name: str = "default") -> Version | None:
            calls.append(user)
            answer.wait(30)
            return champion(user, name)

        world.registry.champion = hang  # type: ignore[method-assign, assignment]
        world.now += 6
        for _ in range(3):
            assert await world.cache.get(ALICE, "default") is not None
        assert len(calls) == 1
        assert world.count("ptuning_registry_errors_total") == 1
        answer.set()

    try:
        run(story())
    finally:
        answer.set()


def test_concurrent_requests_of_one_user_load_once_and_one_that_leaves_stops_nobody(
    world: World,
) -> None:
    world.promote("alice")
    calls = []
    champion = world.registry.champion

    def counted(user: str, name: str = "default") -> Version | None:
        calls.append(user)
        return champion(user, name)

    world.registry.champion = counted  # type: ignore[method-assign, assignment]

    async def story() -> list[Any]:
        tasks = [asyncio.create_task(world.cache.get(ALICE, "default")) for _ in range(8)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = run(story())
    assert isinstance(results[0], asyncio.CancelledError)
    assert len({id(result) for result in results[1:]}) == 1
    assert len(calls) == 1
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
    read = [Path(uri).parent.name for uri in world.reads]
    assert read == [user_key(user) for user in (*fitting, last, second)]
    assert world.cache.nbytes == room * size


def test_a_prefix_larger_than_the_cache_is_served_and_not_kept(
    backbone: Backbone, tmp_path: Path
) -> None:
    world = World(backbone, tmp_path, prefix_cache_mb=0)
    world.promote("alice")
    assert run(world.cache.get(ALICE, "default")) is not None
    assert world.cache.nbytes == 0


def test_an_unexpected_error_of_the_registry_is_no_answer_either(world: World) -> None:
    def broken(user: str, name: str = "default") -> Version | None:
        raise RegistryError("holds something unexpected")

    world.registry.champion = broken  # type: ignore[method-assign, assignment]
    assert refusal(world.cache.get(ALICE, "default")).fields["status"] == 503
