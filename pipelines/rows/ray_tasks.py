"""Helpers for Ray: cut work into tasks, run them with progress and our errors, silence Ray Data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast

import ray
import ray.data

from ptuning.errors import PTuningError

Progress = Callable[[str, int, int], None]  # stage, done, total (0: not known)
GROUP_BYTES, GROUP_ITEMS = 64 << 20, 500  # of small items that share a task
_Value = TypeVar("_Value")


def cpus() -> int:
    """CPUs of the whole cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """No progress bars or warnings from Ray Data; the caller shows progress."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


def _call(task: Callable[[], Any]) -> Any:
    return task()


def run_all(tasks: Sequence[Callable[[], Any]], stage: str, report: Progress) -> list[Any]:
    """Run all tasks, each on one CPU, and return the results in order. Errors of ours are raised
    unwrapped."""
    remote = ray.remote(num_cpus=1, max_retries=3)(_call)
    references = [remote.remote(task) for task in tasks]
    pending = list(references)
    try:
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            ray.get(done)  # raises a task's error as soon as it occurs
            report(stage, len(references) - len(pending), len(references))
        return list(ray.get(references))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PTuningError):
            raise error.cause from None
        raise
    finally:
        for reference in pending:
            ray.cancel(reference)


class Shared(Generic[_Value]):
    """A value that many tasks need, sent to each node once."""

    def __init__(self, value: _Value) -> None:
        # In a list, because Ray would otherwise fetch it for each task.
        self._reference = [ray.put(value)]

    def get(self) -> _Value:
        found: _Value = ray.get(cast(Any, self._reference[0]))
        return found


def call_with(function: Callable[..., Any], job: Any, shared: Shared[Any]) -> Any:
    """`function(job, value)`, in a task."""
    return function(job, shared.get())


def make_groups(items: Sequence[Any], size: Callable[[Any], int]) -> list[list[Any]]:
    """Group consecutive items, so that small ones share a task."""
    groups: list[list[Any]] = []
    filled = 0
    for item in items:
        if not groups or filled + size(item) > GROUP_BYTES or len(groups[-1]) >= GROUP_ITEMS:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size(item)
    return groups


def split_evenly(items: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """Cut items into at most `parts` groups of about equal length, in order."""
    size = -(-len(items) // max(parts, 1)) or 1
    return [items[start : start + size] for start in range(0, len(items), size)]
