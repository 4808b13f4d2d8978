"""Registration behind training: in order, patient with an outage, and complete after errors."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from packs import pack_of
from registry_backends import FINGERPRINT, digest_of, open_at, start_postgresql
from waiting import wait_until

from pipelines.candidates import stream as stream_module
from pipelines.candidates.stream import RegistrationStream
from pipelines.config import load_config
from pipelines.done_record import DoneRecord
from pipelines.gangs.cluster import NamedBackbone
from pipelines.opening import Run
from pipelines.plan import Pack, Plan
from pipelines.rows.index import IndexRules
from pipelines.rows.stored import Partition
from pipelines.run_folder import RunFolder
from pipelines.stages import Registrar
from ptuning.errors import RegistryError, RegistryUnreachable, RunError
from ptuning.identity import Recipe
from ptuning.store import Store
from ptuning.store_identity import StoreIdentity
from ptuning.types import Gate, UserReport


class Registry:
    """Registers numbers as packs of that many users; `failures` are raised first."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.packs: list[int] = []
        self.registered = threading.Event()

    def register(self, pack: int) -> int:
        if self.failures:
            raise self.failures.pop(0)
        self.packs.append(pack)
        self.registered.set()
        return pack


def _open(
    registry: Registry, notes: list[str] | None = None, patience_s: float = 60
) -> RegistrationStream[int]:
    note = (notes if notes is not None else []).append
    return RegistrationStream(registry.register, patience_s=patience_s, note=note)


def _ignore(done: int, tokens: int) -> None:
    pass


def test_packs_are_registered_while_others_are_still_to_come() -> None:
    registry, seen = Registry(), []
    with _open(registry) as stream:
        stream.add(3)
        assert registry.registered.wait(10), "before finish is called"
        stream.add(4)
        stream.finish(lambda users, _: seen.append(users))
    assert registry.packs == [3, 4]
    assert seen[-1] == stream.users == 7


def test_an_outage_is_waited_out_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "_FIRST_WAIT_S", 0.01)
    down, notes = RegistryUnreachable("the registry is down"), list[str]()
    registry = Registry(down, down, down)
    with _open(registry, notes) as stream:
        stream.add(1)
        stream.finish(_ignore)
    assert registry.packs == [1]
    assert notes == ["the registry is down; trying again for 60 s", "the registry answers again"]


def _register_all(registry: Registry, packs: list[int], patience_s: float) -> None:
    with _open(registry, patience_s=patience_s) as stream:
        for pack in packs:
            stream.add(pack)
        stream.finish(_ignore)


def test_a_refusal_is_not_tried_again_and_is_told_at_once() -> None:
    registry, notes = Registry(RegistryError("refused")), list[str]()
    with _open(registry, notes) as stream:
        stream.add(1)
        wait_until(lambda: bool(notes), 10)
        with pytest.raises(RegistryError, match="refused"):
            stream.finish(_ignore)
    assert notes == ["registration stopped: refused"]
    assert registry.packs == []


def test_what_was_given_up_is_tried_once_more_at_the_end() -> None:
    down = RegistryUnreachable("down")
    registry, notes = Registry(down), list[str]()
    with _open(registry, notes, patience_s=0) as stream:
        stream.add(1)
        wait_until(lambda: bool(notes), 10)
        stream.add(2)
        stream.finish(_ignore)
    assert registry.packs == [1, 2]
    registry = Registry(down, down)
    with pytest.raises(RegistryUnreachable):
        _register_all(registry, [1, 2], 0.0)
    assert registry.packs == []


def _raise_beside(registry: Registry, packs: list[int], error: BaseException) -> None:
    with _open(registry) as stream:
        for pack in packs:
            stream.add(pack)
        raise error


def test_what_is_committed_is_registered_though_training_fails() -> None:
    registry = Registry()
    with pytest.raises(RunError):
        _raise_beside(registry, [1, 2, 3, 4, 5], RunError("the training gang failed"))
    assert registry.packs == [1, 2, 3, 4, 5]


def test_a_person_who_stops_the_run_does_not_wait_for_the_registry() -> None:
    registry, began = Registry(*[RegistryUnreachable("down")] * 1000), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        _raise_beside(registry, [1], KeyboardInterrupt())
    assert time.monotonic() - began < 10
    assert registry.packs == []


# ---------------------------------------------------------------- a run's packs, a real database


def _run_of(store: Store, packs: list[Pack]) -> Run:
    """A run whose packs are all trained and promoted."""
    config = load_config(None, ["backbone.name=any"], {})
    folder = RunFolder(store, "20260101-000000-aaaa")
    for pack in packs:
        reports = [
            UserReport(
                user_key=user.user_key,
                status="trained",
                digest=digest_of(user.user_key, "first"),
                decision="promoted",
                gate=Gate(decision="promoted", reason="better"),
            )
            for user in pack.users
        ]
        record = DoneRecord(
            pack_id=pack.pack_id, attempt="a", seconds=1.0, champions={}, reports=tuple(reports)
        )
        folder.commit(record)
    part = Partition(
        partition_id="part",
        rules=IndexRules("fit", None, 8),
        rows_read=0,
        rows_kept=0,
        rows_quarantined=0,
        users=0,
        too_few=0,
        seconds=0.0,
    )
    return Run(
        folder=folder,
        config=config,
        part=part,
        recipe=Recipe(config.method, config.train),
        identity=StoreIdentity("tests", b"the salt of a store"),
        backbone=NamedBackbone(
            backbone_name="any", fingerprint=FINGERPRINT, template_digest="template"
        ),
        config_digest="config",
        resumed=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_database_that_stops_and_starts_gets_every_user_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "_LONGEST_WAIT_S", 1.0)
    packs = [pack_of(*[f"{letter}{n}" * 26 for n in "abcd"]) for letter in "efghijklmn"]
    plan = Plan(packs=tuple(packs), planned_at=1)
    run, notes = _run_of(Store(tmp_path), packs), list[str]()
    with start_postgresql() as database:
        registry = open_at(database.create_database("stream"))
        registrar = Registrar(run, plan, registry)
        calls = 0

        def register(pack: Pack) -> int:
            nonlocal calls
            calls += 1
            if calls == 4:
                database.stop()
                threading.Timer(4.0, database.start).start()
            return registrar.register(pack)

        with RegistrationStream(register, patience_s=120, note=notes.append) as stream:
            for pack in registrar.all_packs():
                stream.add(pack)
            stream.finish(_ignore)
        assert stream.users == 40
        assert len(notes) == 2, notes
        again = Registrar(run, plan, registry)
        assert sum(again.register(pack) for pack in again.all_packs()) == 40
        assert again.reports == registrar.reports
        current = registry.current([user.user_key for pack in packs for user in pack.users])
        assert len(current) == 40
        for key, now in current.items():
            assert now.champion is not None
            assert (now.champion.version, now.champion.digest) == ("1", digest_of(key, "first"))
