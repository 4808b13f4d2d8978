"""The ledger's desk, in this process: progress, and that the store has a fact before it counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packs import pack_of

from pipelines.done_record import DoneRecord
from pipelines.gangs.desk import Desk, PackPost
from pipelines.run_folder import RunFolder
from ptuning.store import Store
from ptuning.types import UserReport

RUN = "20260101-000000-aaaa"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(Store(tmp_path), RUN)


def desk_of(folder: RunFolder, *packs: Any) -> Desk:
    return Desk(folder.store.root, folder.run_id, packs)


def as_actor(desk: Desk) -> Any:
    return SimpleNamespace(set_users=SimpleNamespace(remote=desk.set_users))


def record(pack: Any, attempt: str = "0") -> DoneRecord:
    reports = tuple(UserReport(user_key=u.user_key, status="trained") for u in pack.users)
    return DoneRecord(
        pack_id=pack.pack_id, attempt=attempt, seconds=1.0, champions={}, reports=reports
    )


def test_users_are_counted_as_they_finish_and_failed_ones_with_their_pack(
    folder: RunFolder,
) -> None:
    desk = desk_of(folder)
    first, second = PackPost(as_actor(desk), "first"), PackPost(as_actor(desk), "second")
    first.add_user("ann")
    second.add_user("bob")
    first.add_user("cy")
    assert desk.read().users == 3
    first.close(4)  # two of its users could not be trained
    assert desk.read().users == 5


def test_a_pack_that_is_trained_again_counts_its_users_once(folder: RunFolder) -> None:
    desk = desk_of(folder)
    for _ in range(2):  # again, after the first worker's death
        post = PackPost(as_actor(desk), "first")
        assert desk.read().users == 0
        post.add_user("ann")
    post.close(2)
    assert desk.read().users == 2


def test_a_desk_that_is_opened_again_knows_what_was_done_and_split(folder: RunFolder) -> None:
    done, poisoned, left = pack_of("a", "b"), pack_of("c", "d", "e"), pack_of("f")
    desk = desk_of(folder, done, poisoned, left)
    folder.commit(record(done))
    desk.done(done.pack_id)
    while desk.take("gang-0/0") != poisoned:
        pass
    desk.end("gang-0", 1, {0: "killed"})
    assert desk.read().told == (
        "a worker failed on a pack of 3 users; it is tried again in 3 parts",
    )
    assert desk.read().told == ()
    again = desk_of(folder, done, poisoned, left)
    assert again.read().users == 2
    assert again.read().left == 4  # c, d and e alone, and f
    assert [pack.users[0].user_key for pack in folder.unfold([poisoned])] == ["c", "d", "e"]
    assert folder.read_done(poisoned.pack_id) is None


def test_a_late_worker_cannot_commit_a_pack_that_was_split(folder: RunFolder) -> None:
    pack = pack_of("a", "b")
    desk = desk_of(folder, pack)
    desk.take("gang-0/0")
    desk.end("gang-0", 1, {0: "cut off"})
    assert not folder.commit(record(pack, "late"))
    assert [len(part.users) for part in folder.unfold([pack])] == [1, 1]
    desk.done(pack.pack_id, committed=False)
    assert desk.read().committed == (), "there is no record of it to register"


def test_a_pack_that_was_done_before_its_worker_died_is_not_split(folder: RunFolder) -> None:
    pack = pack_of("a", "b")
    desk = desk_of(folder, pack)
    desk.take("gang-0/0")
    folder.commit(record(pack))  # and died before it could report it
    desk.end("gang-0", 1, {0: "killed"})
    standing = desk.read()
    assert (standing.told, standing.left, standing.users) == ((), 0, 2)
    assert folder.unfold([pack]) == [pack]
    done = folder.read_done(pack.pack_id)
    assert done is not None
    assert done.attempt == "0"


def test_a_user_who_is_given_up_is_recorded_as_failed_with_the_reason(folder: RunFolder) -> None:
    pack = pack_of("a")
    desk = desk_of(folder, pack)
    for gang in ("gang-0", "gang-1"):
        assert desk.take(f"{gang}/0") == pack
        assert desk.end(gang, 1, {0: "out of memory"}) == 1
    suspicion, verdict = desk.read().told
    assert "tried once more" in suspicion
    assert "a is given up and counts as failed: out of memory" in verdict
    assert desk.read().left == 0
    done = folder.read_done(pack.pack_id)
    assert done is not None
    (report,) = done.reports
    assert (report.user_key, report.status, report.stage) == ("a", "failed", "tune")
    assert "out of memory" in str(report.error)


def test_a_gang_that_has_ended_gets_no_more_packs(folder: RunFolder) -> None:
    """Its workers may still ask until they are killed."""
    desk = desk_of(folder, pack_of("a"), pack_of("b"))
    desk.take("gang-0/0")
    assert desk.end("gang-0", 2, {}, blameless=True) == 0
    assert desk.take("gang-0/1") is None
    assert desk.read().open == 2
    assert desk.take("gang-1/0") is not None


def test_a_split_that_another_desk_wrote_first_is_followed(folder: RunFolder) -> None:
    """An old driver's desk may still write while a new driver resumes the run."""
    pack = pack_of("a", "b", "c")
    desk = desk_of(folder, pack)
    old = desk_of(folder, pack)
    old.take("old/0")
    old.end("old", 1, {0: "killed"})
    assert desk.take("gang-0/0") == pack
    assert not folder.commit(record(pack, "too late"))
    desk.done(pack.pack_id, committed=False)
    assert desk.read().left == 3
