"""Registering a run's candidates: a promoted one was compared with the champion it replaces."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.candidates.publish import deploy
from pipelines.candidates.register import (
    Lineage,
    hold_overtaken,
    register_pack,
    retire_users,
)
from pipelines.candidates.rejudge import find_losses, records_of
from pipelines.done_record import DoneRecord
from pipelines.plan import Pack, PlannedUser
from pipelines.report.metrics import (
    LOSS_NAMES,
    PACK_METRICS,
    USER_METRICS,
    WORKER_METRICS,
    pack_metrics,
    user_metrics,
    worker_metrics,
)
from pipelines.run_folder import RunFolder
from ptuning.champions import ChampionList, ChampionRef, acknowledge, publish
from ptuning.errors import ConfigError, RunError
from ptuning.pack import PackResult
from ptuning.registry import MemoryRegistry, RegistryConfig, registry_uri
from ptuning.registry.base import PackRecord
from ptuning.store import Store
from ptuning.types import EpochLoss, SplitLosses, UserReport, user_key

KEY = user_key("ann")


def _digest(name: str) -> str:
    """A digest derived from a name."""
    return hashlib.sha256(name.encode()).hexdigest()


OURS, OLD = _digest("ours"), _digest("old")
FINGERPRINT = "f" * 64


def _report(digest: str, decision: str = "promoted") -> UserReport:
    return UserReport(user_key=KEY, status="trained", digest=digest, decision=decision)  # type: ignore[arg-type]


def _register(
    registry: MemoryRegistry, report: UserReport, gate: str = "g", planned_at: int = 0
) -> None:
    register_pack(
        registry,
        PackRecord(run_id="r", pack_id=str(report.digest), planned_at=planned_at),
        [report],
        _planned_user(None),
        Lineage(prefix_name="default", template_digest="t", gate_digest=gate, tags={}),
    )


def _planned_user(champion: str | None, candidate: str | None = None) -> dict[str, PlannedUser]:
    user = PlannedUser(
        user_key=KEY,
        tokens=1,
        data_digest="d",
        training_digest="t",
        champion_digest=champion,
        candidate_digest=candidate,
    )
    return {KEY: user}


def test_a_champion_that_was_never_compared_with_is_not_replaced(tmp_path: Path) -> None:
    """Someone rolled the champion back by hand during the training."""
    registry = MemoryRegistry()
    for digest in (_digest("first"), _digest("second")):
        _register(registry, _report(digest))
    first = registry.versions(KEY)[0]
    registry.set_alias(first, "champion")
    report = _report(OURS)
    planned = _planned_user(champion=_digest("second"), candidate=_digest("second"))
    assert hold_overtaken(registry, "default", [report], planned) == set()
    assert report.decision == "pending"
    _register(registry, report)
    current = registry.current([KEY])[KEY]
    assert current.champion is not None
    assert current.champion.digest == _digest("first")
    assert current.candidate is not None
    assert current.candidate.digest != OURS, "a pending user is not finished"


def test_a_run_that_a_newer_one_overtook_registers_nothing(tmp_path: Path) -> None:
    """Otherwise the alias would return to older rows, and the next run would train all again."""
    registry = MemoryRegistry()
    _register(registry, _report(_digest("newer"), "rejected"))
    for decision in ("promoted", "rejected"):
        report = _report(OURS, decision)
        planned = _planned_user(champion=None, candidate=None)
        assert hold_overtaken(registry, "default", [report], planned) == {KEY}
        assert report.decision == "pending"


@pytest.mark.parametrize("champion", [OLD, OURS])
def test_a_champion_that_was_compared_with_is_replaced(tmp_path: Path, champion: str) -> None:
    registry = MemoryRegistry()
    _register(registry, _report(champion))
    report = _report(OURS)
    planned = _planned_user(champion=OLD, candidate=OLD)
    assert hold_overtaken(registry, "default", [report], planned) == set()
    assert report.decision == "promoted"


def test_a_retired_user_has_no_champion_and_is_a_new_user_when_coming_back(tmp_path: Path) -> None:
    registry = MemoryRegistry()
    _register(registry, _report(OURS))
    assert list(registry.with_champion()) == [KEY]
    for _ in range(2):  # again, after a kill in between
        retire_users(registry, [KEY], "default", 1)
    assert registry.current([KEY]) == {}
    assert list(registry.with_champion()) == []


def test_an_older_run_that_is_resumed_retires_nobody_whom_a_newer_one_trained(
    tmp_path: Path,
) -> None:
    registry = MemoryRegistry()
    _register(registry, _report(OURS), planned_at=2)
    assert retire_users(registry, [KEY], "default", 1) == []
    assert registry.champion(KEY) is not None
    assert retire_users(registry, [KEY], "default", 3) == [KEY]


def test_every_declared_metric_is_reported() -> None:
    """The user has losses of every judge, so a declared metric that nothing sets is missed."""
    result = PackResult(user_key=KEY, history=[EpochLoss(epoch=1, train=2.0, valid=1.0)])
    measured = worker_metrics(result)
    assert measured == {"epochs": 1}
    report = replace(_report(OURS), steps=3, tokens=40, decision="promoted", measured=measured)
    loss = SplitLosses(nats=(1.0,), tokens=(1,))
    report.losses |= {who: {"valid": loss, "test": loss} for who in LOSS_NAMES}
    assert user_metrics(report).keys() == USER_METRICS.keys() | WORKER_METRICS.keys()
    assert not USER_METRICS.keys() & WORKER_METRICS.keys()
    assert pack_metrics([report]).keys() == PACK_METRICS.keys()


def test_a_loss_that_no_report_knows_is_refused() -> None:
    report = _report(OURS)
    assert user_metrics(report) == {"steps": 0, "tokens": 0}
    report.losses["bsae"] = {"valid": SplitLosses(nats=(1.0,), tokens=(1,))}
    with pytest.raises(RunError, match="bsae"):
        user_metrics(report)


# ---------------------------------------------------------------- judging again


def _losses(**nats: float) -> dict[str, dict[str, SplitLosses]]:
    return {who: {"valid": SplitLosses(nats=(n,), tokens=(1,))} for who, n in nats.items()}


def _judged_user(champion: str | None) -> PlannedUser:
    (user,) = _planned_user(champion, "ours").values()
    return replace(user, run_id="monday", pack_id="p")


def _record(store: Store, compared: str | None, digest: str = "ours") -> None:
    losses = _losses(base=3.0, champion=2.0, candidate=1.0)
    report = UserReport(user_key=KEY, status="trained", digest=digest, losses=losses)
    record = DoneRecord(
        pack_id="p", attempt="0", seconds=0.0, champions={KEY: compared}, reports=(report,)
    )
    RunFolder(store, "monday").commit(record)


@pytest.mark.parametrize(
    ("champion", "rivals"),
    [
        ("old", {"base", "champion", "candidate"}),  # it was compared with
        ("ours", {"base", "champion", "candidate"}),  # the candidate won
        (None, {"base", "candidate"}),  # the champion is gone
    ],
)
def test_stored_losses_judge_a_prefix_against_what_the_user_has_now(
    tmp_path: Path, champion: str | None, rivals: set[str]
) -> None:
    store = Store(tmp_path)
    _record(store, "old")
    packs = [Pack(pack_id="j", users=(_judged_user(champion),))]
    found = find_losses(store, packs)
    report, compared = found[KEY]
    assert set(report.losses) == rivals
    assert compared == "old"
    (kept,) = records_of(packs, found)
    assert (kept.pack_id, kept.champions, kept.reports) == ("j", {KEY: "old"}, (report,))


def test_stored_losses_that_do_not_apply_are_not_used(tmp_path: Path) -> None:
    store = Store(tmp_path)
    packs = [Pack(pack_id="j", users=(_judged_user("a third prefix"),))]
    assert find_losses(store, packs) == {}, "there is no record"
    _record(store, "old")
    assert find_losses(store, packs) == {}, "it was never compared with the present champion"
    store.write("runs/monday/done/p.json", b"{")
    packs = [Pack(pack_id="j", users=(_judged_user("old"),))]
    assert find_losses(store, packs) == {}, "the record is damaged"
    store.remove("runs/monday")
    _record(store, "old", digest="another prefix")
    assert find_losses(store, packs) == {}, "the losses are of another prefix"


def test_a_prefix_judged_by_another_gate_says_so_in_the_registry(tmp_path: Path) -> None:
    registry = MemoryRegistry()
    for gate in ("strict", "mild"):
        _register(registry, _report(OURS), gate)
        candidate = registry.current([KEY])[KEY].candidate
        assert candidate is not None
        assert (candidate.version, candidate.gate_digest) == ("1", gate)


def test_what_is_deployed_is_read_back_and_late_replicas_are_named(tmp_path: Path) -> None:
    store, name = Store(tmp_path), (KEY, "default")
    acknowledge(store, FINGERPRINT, "late", 0, 1)
    generation, late = deploy(store, FINGERPRINT, {name: ChampionRef(OURS, "1")}, 0.1)
    assert (generation, late) == (1, ["late"])
    champions = ChampionList(store, FINGERPRINT)
    champions.refresh()
    assert champions.get(*name) == ChampionRef(OURS, "1")
    acknowledge(store, FINGERPRINT, "late", 2, 2)
    assert deploy(store, FINGERPRINT, {name: None}, 0.1) == (2, [])
    assert deploy(store, FINGERPRINT, {}, 0.1) == (2, [])


def test_a_deployment_that_another_run_undid_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name = Store(tmp_path), (KEY, "default")

    def overtaken(*arguments: Any) -> int:
        publish(*arguments)
        return publish(store, FINGERPRINT, {name: ChampionRef(OLD, "2")})

    monkeypatch.setattr("pipelines.candidates.publish.publish", overtaken)
    with pytest.raises(RunError, match="not those that this run decided on"):
        deploy(store, FINGERPRINT, {name: ChampionRef(OURS, "1")}, 0.1)


def test_a_store_elsewhere_needs_a_named_registry_and_takes_it() -> None:
    elsewhere = Store("memory://bucket/ptuning")
    named = RegistryConfig(uri="http://127.0.0.1:5000")
    assert registry_uri(named, elsewhere) == named.uri
    with pytest.raises(ConfigError, match=r"registry\.uri"):
        registry_uri(RegistryConfig(), elsewhere)
