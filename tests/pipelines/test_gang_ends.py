"""How the driver interprets a gang's end: who is blamed, and when the run gives up."""

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


def wrap_error(error: Exception) -> UserExceptionWithTraceback:
    """A worker's error as Ray passes it on."""
    return UserExceptionWithTraceback(error, traceback_str="...")


def make_group_error(**workers: Exception) -> WorkerGroupError:
    return WorkerGroupError("...", {int(rank[1:]): error for rank, error in workers.items()})


def test_a_worker_that_raised_is_blamed_with_its_error() -> None:
    end = end_of(make_group_error(_1=wrap_error(MemoryError("too large"))))
    assert end.blamed == {1: "MemoryError: too large"}
    assert end.error == "MemoryError: too large"
    assert (end.refused, end.blameless, end.unplaced) == (None, False, False)


def test_peers_of_a_worker_that_died_are_not_blamed() -> None:
    died = WorkerHealthCheckFailedError("the worker died", RuntimeError("SIGKILL"))
    end = end_of(
        make_group_error(_0=wrap_error(RuntimeError("connection closed by peer")), _1=died)
    )
    assert set(end.blamed) == {1}
    assert "SIGKILL" in str(end.error)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError("no"), ConnectionError("x")]
)
def test_an_error_of_the_store_blames_nobody(error: Exception) -> None:
    assert end_of(make_group_error(_0=wrap_error(error))).blameless


def test_an_error_of_an_object_stores_client_blames_nobody() -> None:
    botocore = pytest.importorskip("botocore.exceptions", reason="no botocore: the extra s3")
    assert not isinstance(botocore.NoCredentialsError(), OSError)
    assert end_of(make_group_error(_0=wrap_error(botocore.NoCredentialsError()))).blameless


def test_running_out_of_memory_may_be_blamed_on_a_user() -> None:
    assert not end_of(
        make_group_error(_0=wrap_error(OSError(12, "Cannot allocate memory")))
    ).blameless


def test_an_error_that_would_only_repeat_ends_the_run() -> None:
    end = end_of(
        make_group_error(_0=wrap_error(MethodError("the method does not fit", seen="a", fix="b")))
    )
    assert "the method does not fit" in str(end.refused)


def test_workers_without_room_are_distinguished_from_workers_that_failed() -> None:
    assert end_of(ControllerError(WorkerGroupStartupTimeoutError(2))).unplaced
    assert not end_of(ControllerError(RuntimeError("another"))).unplaced


def make_standing(done: int = 0) -> Standing:
    return Standing(users=0, tokens=0, open=1, left=1, done=done)


def test_failures_without_progress_are_tolerated_up_to_max_failures() -> None:
    patience = Patience(max_failures=2)
    assert [patience.is_lost(0, make_standing()) for _ in range(3)] == [False, False, True]
    assert Patience(max_failures=0).is_lost(0, make_standing())


def test_a_pack_done_or_blamed_resets_the_count_of_failures() -> None:
    patience = Patience(max_failures=1)
    assert not patience.is_lost(0, make_standing())
    assert not patience.is_lost(1, make_standing())
    assert not patience.is_lost(0, make_standing())
    assert not patience.is_lost(0, make_standing(done=1))
    assert not patience.is_lost(0, make_standing(done=1))
    assert patience.is_lost(0, make_standing(done=1))


def test_a_run_in_which_every_worker_dies_ends() -> None:
    """Each failure blames a pack, but none is ever done."""
    patience = Patience(max_failures=3)
    lost = [patience.is_lost(1, make_standing()) for _ in range(BARREN + 1)]
    assert lost == [*[False] * BARREN, True]
