"""One gang from its start to its end, in an actor on the gang's own node.

Ray Train's controller stays on the node that calls `fit()`, and needs memory there. Torch is not
imported here: only the workers need it.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
import ray.train
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipelines.gangs.places import Place
from ptuning.errors import PTuningError


@dataclass(frozen=True)
class GangEnd:
    """How a gang ended: of its own accord, or early, with an `error`."""

    blamed: dict[int, str] = field(default_factory=dict)  # ranks of workers that died, and why
    error: str | None = None
    refused: str | None = None  # an error that would only repeat
    blameless: bool = False  # the error has nothing to do with the users who were trained
    unplaced: bool = False  # Ray found no room for the workers


class GangHost:
    """An actor that runs one gang. An actor, since the driver of a task whose node is killed may
    crash (Ray 2.60: "Tried to complete task that was not pending")."""

    def fit(self, work: list[Any], gang: str, place: Place, scratch: str) -> GangEnd:
        """Run the gang's workers until they have no more packs, or one of them dies.

        `work` has one element, a reference to the task and the desk. It is a reference so that only
        the workers unpickle it, and import torch for it.
        """
        # Without a process group: replicated workers have nothing to say to each other, and nothing
        # that listens is opened for it. Sharded ones join one themselves (meeting.py).
        trainer = DataParallelTrainer(
            partial(_start_worker, work, gang, place),
            scaling_config=ScalingConfig(
                num_workers=place.workers,
                use_gpu=bool(place.gpus),
                resources_per_worker={
                    "CPU": place.cpus,
                    **({"GPU": place.gpus} if place.gpus else {}),
                },
                label_selector={"ray.io/node-id": place.node_id} if place.node_id else None,
            ),
            run_config=ray.train.RunConfig(
                name=gang,
                storage_path=scratch,
                # A death is looked into before anything starts again; what cannot be placed is
                # given up: the supervisor knows where there is room.
                failure_config=FailureConfig(
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 - whatever it was, it is looked into
            return end_of(error)
        return GangEnd()


def _start_worker(work: list[Any], gang: str, place: Place) -> None:
    from pipelines.gangs.train import run_worker  # imports torch

    task, desk = ray.get(work[0])
    run_worker(task, desk, gang, place)


def end_of(error: Exception) -> GangEnd:
    """What an error of Ray Train's `fit()` says of the workers."""
    failures: dict[int, Any] = getattr(error, "worker_failures", None) or {}
    causes = {rank: _cause(failure) for rank, failure in failures.items()}
    reasons = {rank: _reason(failure) for rank, failure in failures.items()}
    # Where some have died, the others' errors are those of peers who lost them.
    died = {r for r, cause in causes.items() if type(cause).__name__ == _DIED}
    blamed = {rank: why for rank, why in reasons.items() if rank in (died or reasons)}
    said = next(iter(blamed.values()), _reason(error))
    refused = next((str(c) for c in causes.values() if isinstance(c, PTuningError)), None)
    return GangEnd(
        blamed,
        said,
        refused,
        blameless=not died and any(map(_is_of_the_store, causes.values())),
        unplaced=type(getattr(error, "controller_failure", error)).__name__ == _UNPLACED,
    )


_DIED, _UNPLACED = "WorkerHealthCheckFailedError", "WorkerGroupStartupTimeoutError"
# Clients of object stores raise errors of their own, which are no OSErrors.
_CLIENTS = {"botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec", "gcsfs"}


def _is_of_the_store(cause: BaseException) -> bool:
    """Whether it is a disk's, a store's or the network's error, which no user's rows cause."""
    if isinstance(cause, OSError):
        return cause.errno != errno.ENOMEM
    return any(kind.__module__.split(".")[0] in _CLIENTS for kind in type(cause).__mro__)


def _cause(failure: BaseException) -> BaseException:
    """What a worker raised; Ray wraps it together with its traceback's text."""
    cause: BaseException = getattr(failure, "_base_exc", failure)
    return cause


def _reason(failure: BaseException) -> str:
    """What it is, and the first and last lines of its text."""
    cause = _cause(failure)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: " + " | ".join(lines[:1] + lines[1:][-1:])
