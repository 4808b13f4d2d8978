"""Registering a run's candidates: what is promoted was compared with what it replaces."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.candidates.publish import deploy
from pipelines.candidates.register import hold_overtaken, register_pack
from pipelines.plan import PlannedUser
from ptuning.errors import ConfigError, RunError
from ptuning.registry import MemoryRegistry, RegistryConfig, registry_uri
from ptuning.registry.base import PackRecord
from ptuning.store import Store
from ptuning.types import UserReport, user_key

KEY = user_key("ann")


def _report(digest: str, decision: str = "promoted") -> UserReport:
    return UserReport(user_key=KEY, status="trained", digest=digest, decision=decision)  # type: ignore[arg-type]


def _register(
    registry: MemoryRegistry, tmp_path: Path, report: UserReport, gate: str = "g"
) -> None:
    register_pack(
        registry,
        Store(tmp_path),
        PackRecord(run_id="r", pack_id=str(report.digest)),
        [report],
        lambda _report: {"training_digest": "t", "data_digest": "d", "decision": "x"},
        "default",
        gate,
    )


def _planned(champion: str | None) -> dict[str, PlannedUser]:
    user = PlannedUser(
        user_key=KEY,
        bucket=0,
        tokens=1,
        data_digest="d",
        training_digest="t",
        champion_digest=champion,
    )
    return {KEY: user}


def test_a_champion_that_was_never_compared_with_is_not_replaced(tmp_path: Path) -> None:
    registry = MemoryRegistry()
    _register(registry, tmp_path, _report("theirs"))
    report = _report("ours")
    hold_overtaken(registry, "default", [report], _planned(champion=None))
    assert report.decision == "pending"
    _register(registry, tmp_path, report)
    current = registry.current([KEY])[KEY]
    assert current.champion is not None
    assert current.champion.digest == "theirs"
    assert current.candidate is not None
    assert current.candidate.gate_digest == "", "a pending user must be judged again"


@pytest.mark.parametrize("champion", ["old", "ours"])
def test_a_champion_that_was_compared_with_is_replaced(tmp_path: Path, champion: str) -> None:
    registry = MemoryRegistry()
    _register(registry, tmp_path, _report(champion))
    report = _report("ours")
    hold_overtaken(registry, "default", [report], _planned(champion="old"))
    assert report.decision == "promoted"


def test_a_prefix_judged_by_another_gate_says_so_in_the_registry(tmp_path: Path) -> None:
    registry = MemoryRegistry()
    for gate in ("strict", "mild"):
        _register(registry, tmp_path, _report("ours"), gate)
        candidate = registry.current([KEY])[KEY].candidate
        assert candidate is not None
        assert (candidate.version, candidate.gate_digest) == ("1", gate)


def test_deployment_is_checked_against_the_registry(tmp_path: Path) -> None:
    registry = MemoryRegistry()
    _register(registry, tmp_path, _report("ours"))
    deploy(registry, {KEY: "ours"}, "default")
    with pytest.raises(RunError, match="not the registry's champions"):
        deploy(registry, {KEY: "another"}, "default")


def test_a_store_elsewhere_needs_a_named_registry_and_takes_it() -> None:
    elsewhere = Store("memory://bucket/ptuning")
    named = RegistryConfig(uri="http://127.0.0.1:5000")
    assert registry_uri(named, elsewhere) == named.uri
    with pytest.raises(ConfigError, match=r"registry\.uri"):
        registry_uri(RegistryConfig(), elsewhere)
