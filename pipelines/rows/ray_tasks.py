"""Helpers for Ray: run many tasks with progress and our errors, and silence Ray Data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.data

from ptuning.errors import PTuningError

Progress = Callable[[str, int, int], None]  # stage, done, total (0: not known)


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
