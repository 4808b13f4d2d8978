"""A run's folder: what is written is read back, and only one driver works on a run."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import fields
from pathlib import Path

import pytest

from pipelines.done_record import DoneRecord
from pipelines.plan import Plan, PlannedUser, make_packs
from pipelines.run_folder import RunFolder, all_runs, find_unfinished, new_run_id
from ptuning.errors import RunError
from ptuning.store import Store
from ptuning.types import Counts, EpochLoss, Gate, SplitLosses, UserReport

HEADER = {"partition_id": "p", "config_digest": "c"}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(Store(tmp_path), "20260101-000000-aaaa")
    folder.write_config(HEADER, "backbone: {dtype: float32}\n")
    return folder


def _users(count: int, **more: str) -> list[PlannedUser]:
    return [
        PlannedUser(
            user_key=f"u{n}",
            tokens=n,
            data_digest="d",
            training_digest=f"t{n}",
            candidate_digest=None,
            **more,
        )
        for n in range(count)
    ]


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(
            packs=make_packs(_users(3, champion_digest="ch"), 2, 1),
            judged=make_packs(_users(2, run_id="r", pack_id="p"), 1, 1),
            skipped={"x": "too_few", "y": "retired"},
            kept=4,
            planned_at=123,
            notes=("something to say",),
        ),
    ],
)
def test_a_plan_comes_back_as_it_was_written(folder: RunFolder, plan: Plan) -> None:
    assert folder.read_plan() is None
    folder.write_plan(plan)
    assert folder.read_plan() == plan
    header = folder.read_plan_header()
    assert header is not None
    assert header["users"]["trained"] == sum(len(pack.users) for pack in plan.packs)


def test_a_plan_counts_only_when_its_header_is_there(folder: RunFolder) -> None:
    folder.write_plan(Plan(packs=make_packs(_users(1), 2, 1)))
    folder.store.remove(f"runs/{folder.run_id}/plan/plan.json")
    assert folder.read_plan() is None


def test_a_done_record_keeps_losses_and_the_first_writer_wins(folder: RunFolder) -> None:
    losses = {"base": {"valid": SplitLosses(nats=(1.5, float("inf")), tokens=(2, 3))}}
    report = UserReport(user_key="u", status="trained", digest="ab", losses=losses)
    record = DoneRecord(
        pack_id="p", attempt="0", seconds=1.0, champions={"u": None}, reports=(report,)
    )
    other = DoneRecord(pack_id="p", attempt="1", seconds=1.0, champions={}, reports=())
    assert folder.read_done("p") is None
    assert folder.commit(record)
    assert not folder.commit(other)
    assert folder.settled_packs() == {"p"}
    found = folder.read_done("p")
    assert found is not None
    assert (found.attempt, found.champions) == ("0", {"u": None})
    nats = found.reports[0].losses["base"]["valid"].nats
    assert nats[0] == 1.5
    assert nats[1] != nats[1], "a loss that is not finite is read as None"


def test_a_report_comes_back_from_its_record_with_every_field() -> None:
    """All but the decision, which is made again. The record is all that the driver gets."""
    loss = SplitLosses(nats=(1.0,), tokens=(2,))
    report = UserReport(
        user_key="u",
        status="trained",
        digest="ab",
        decision="promoted",
        error="none",
        stage="tune",
        steps=3,
        tokens=40,
        history=[EpochLoss(epoch=1, train=2.0, valid=1.0)],
        losses={"base": {"valid": loss}},
        counts={"train": Counts(rows=1, tokens=2)},
        gate=Gate(decision="promoted", reason="better"),
        measured={"epochs": 2.0},
        details={"resets": 1},
    )
    plain = UserReport(user_key="", status="failed")
    same = [f.name for f in fields(report) if getattr(report, f.name) == getattr(plain, f.name)]
    assert same == [], "set the new field to a value other than its default"
    record = DoneRecord(pack_id="p", attempt="0", seconds=1.0, champions={}, reports=(report,))
    (found,) = DoneRecord.from_json(json.loads(json.dumps(record.to_json()))).reports
    assert found == report


def test_the_newest_unfinished_run_of_the_same_header_is_found(folder: RunFolder) -> None:
    store = folder.store
    assert find_unfinished(store, HEADER) is not None
    assert find_unfinished(store, HEADER | {"config_digest": "other"}) is None
    newer = RunFolder(store, "20260102-000000-aaaa")
    newer.write_config(HEADER, "")
    assert find_unfinished(store, HEADER).run_id == newer.run_id  # type: ignore[union-attr]
    newer.write_summary({})
    assert find_unfinished(store, HEADER).run_id == folder.run_id  # type: ignore[union-attr]
    store.write("runs/20260103-000000-aaaa/done/x", b"")  # a folder without a configuration
    assert [found.run_id for found in all_runs(store)] == [folder.run_id, newer.run_id]


def _hold(root: str, run_id: str, ready, go) -> None:  # type: ignore[no-untyped-def]
    with RunFolder(Store(root), run_id).lock():
        ready.set()
        go.wait(60)


def test_running_and_stopped_look_different_and_a_second_driver_is_refused(
    folder: RunFolder,
) -> None:
    assert folder.state() == "unfinished"
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    driver = context.Process(target=_hold, args=(folder.store.root, folder.run_id, ready, go))
    driver.start()
    try:
        assert ready.wait(60)
        assert folder.state() == "running"
        with pytest.raises(RunError, match="another process"), folder.lock():
            pass
        driver.kill()
        driver.join(60)
        assert folder.state() == "stopped"
    finally:
        driver.kill()
    folder.write_summary({})
    assert folder.state() == "finished"


def test_run_ids_sort_by_when_they_began_whatever_the_hosts_zone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import time

    stamps = []
    for zone in ("Pacific/Kiritimati", "Pacific/Midway"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        stamps.append(new_run_id()[:11])
    monkeypatch.undo()
    time.tzset()
    assert stamps[0] == stamps[1]
