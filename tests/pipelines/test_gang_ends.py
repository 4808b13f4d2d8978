"""What the driver makes of a gang's end: whose fault it is, and when it gives up."""

from __future__ import annotations

import pytest
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from pipelines.gangs.desk import Standing
from pipelines.gangs.fit import end_of
from pipelines.gangs.supervise import BARREN, Patience
from ptuning.errors import MethodError


def raised(error: Exception) -> UserExceptionWithTraceback:
    """As Ray hands on what a worker raised."""
    return UserExceptionWithTraceback(error, traceback_str="...")


def failed(**workers: Exception) -> WorkerGroupError:
    return WorkerGroupError("...", {int(rank[1:]): error for rank, error in workers.items()})


def test_a_worker_that_raised_is_blamed_with_what_it_said() -> None:
    end = end_of(failed(_1=raised(MemoryError("too large"))))
    assert end.blamed == {1: "MemoryError: too large"}
    assert end.error == "MemoryError: too large"
    assert (end.refused, end.blameless, end.unplaced) == (None, False, False)


def test_peers_of_a_worker_that_died_are_not_blamed_for_losing_it() -> None:
    died = WorkerHealthCheckFailedError("the worker died", RuntimeError("SIGKILL"))
    end = end_of(failed(_0=raised(RuntimeError("connection closed by peer")), _1=died))
    assert set(end.blamed) == {1}
    assert "SIGKILL" in str(end.error)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError("no"), ConnectionError("x")]
)
def test_a_stores_error_is_nobodys_fault(error: Exception) -> None:
    assert end_of(failed(_0=raised(error))).blameless


def test_errors_of_an_object_stores_client_are_the_stores() -> None:
    botocore = pytest.importorskip("botocore.exceptions", reason="no botocore: the extra s3")
    assert not isinstance(botocore.NoCredentialsError(), OSError)
    assert end_of(failed(_0=raised(botocore.NoCredentialsError()))).blameless


def test_memory_that_runs_out_may_be_a_users_fault() -> None:
    assert not end_of(failed(_0=raised(OSError(12, "Cannot allocate memory")))).blameless


def test_what_would_only_repeat_is_refused() -> None:
    end = end_of(failed(_0=raised(MethodError("the method does not fit", seen="a", fix="b"))))
    assert "the method does not fit" in str(end.refused)


def test_workers_that_found_no_room_are_told_from_workers_that_failed() -> None:
    assert end_of(ControllerError(WorkerGroupStartupTimeoutError(2))).unplaced
    assert not end_of(ControllerError(RuntimeError("another"))).unplaced


def standing(done: int = 0) -> Standing:
    return Standing(users=0, tokens=0, open=1, left=1, done=done)


def test_failures_that_teach_nothing_are_borne_as_often_as_was_asked() -> None:
    patience = Patience(max_failures=2)
    assert [patience.is_lost(0, standing()) for _ in range(3)] == [False, False, True]
    assert Patience(max_failures=0).is_lost(0, standing())


def test_a_pack_that_is_done_or_blamed_renews_the_patience() -> None:
    patience = Patience(max_failures=1)
    assert not patience.is_lost(0, standing())
    assert not patience.is_lost(1, standing())
    assert not patience.is_lost(0, standing())
    assert not patience.is_lost(0, standing(done=1))
    assert not patience.is_lost(0, standing(done=1))
    assert patience.is_lost(0, standing(done=1))


def test_where_every_worker_dies_whatever_it_trains_the_run_ends() -> None:
    """Each failure blames a pack, but none is ever done."""
    patience = Patience(max_failures=3)
    lost = [patience.is_lost(1, standing()) for _ in range(BARREN + 1)]
    assert lost == [*[False] * BARREN, True]
