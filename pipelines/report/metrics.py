"""All metrics that a run reports. A new metric is declared, and computed, here and nowhere else.

A metric has a name, a text and a function, which returns None where there is nothing to report.
There are three kinds, by what the function is given:

- `WORKER_METRICS`: a user's `PackResult`, on the worker that trained it (tensors are at hand);
- `USER_METRICS`: a user's `UserReport`, on the driver;
- `PACK_METRICS`: the reports of a pack, on the driver.

The first two become tags of the user's version in the registry, the third metrics of the pack's
MLflow run. Worker metrics and losses are columns of the users table too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Generic, TypeVar

from ptuning.errors import RunError
from ptuning.types import Split, UserReport

if TYPE_CHECKING:
    from ptuning.pack import PackResult

LOSS_NAMES = ("base", "champion", "candidate", "public", "other")  # what is scored
SCORED: tuple[Split, ...] = ("valid", "test")

_LOSS_TEXTS = {
    "base": "the base model",
    "champion": "the prefix that the user had",
    "candidate": "the prefix that this run trained or judged",
    "public": "the public prefix",
    "other": "another user's prefix",
}

_Of = TypeVar("_Of")


@dataclass(frozen=True)
class Metric(Generic[_Of]):
    """A text for people, and how the value is computed; None means that there is no value."""

    text: str
    value: Callable[[_Of], float | None]


def nll(report: UserReport, name: str, split: str) -> float | None:
    """A user's loss, in nats per completion token; None if there is none or it is not finite,
    which JSON cannot express."""
    losses = report.losses.get(name, {}).get(split)
    found = losses.nll if losses is not None else None
    return found if found is not None and math.isfinite(found) else None


def _loss(name: str, split: Split) -> Metric[UserReport]:
    text = f"nats per completion token of {_LOSS_TEXTS[name]} on {split} rows"
    return Metric(text, lambda report: nll(report, name, split))


def _gain(split: Split) -> Metric[UserReport]:
    def value(report: UserReport) -> float | None:
        base, candidate = nll(report, "base", split), nll(report, "candidate", split)
        return None if base is None or candidate is None else base - candidate

    return Metric(f"nats per completion token saved on {split} rows", value)


def _loss_median(name: str) -> Metric[Sequence[UserReport]]:
    def value(reports: Sequence[UserReport]) -> float | None:
        losses = [nll(report, name, "valid") for report in reports if report.status == "trained"]
        known = [loss for loss in losses if loss is not None]
        return median(known) if known else None

    return Metric(f"median loss of {_LOSS_TEXTS[name]} on valid rows", value)


def _count(text: str, counted: Callable[[UserReport], bool]) -> Metric[Sequence[UserReport]]:
    return Metric(text, lambda reports: sum(map(counted, reports)))


WORKER_METRICS: Mapping[str, Metric[PackResult]] = {
    "epochs": Metric("epochs trained", lambda result: len(result.history)),
}
USER_METRICS: Mapping[str, Metric[UserReport]] = {
    "steps": Metric("optimiser steps", lambda report: report.steps),
    "tokens": Metric("tokens trained on", lambda report: report.tokens),
    **{f"nll_{name}_{split}": _loss(name, split) for split in SCORED for name in LOSS_NAMES},
    # The gate decides on valid rows; publications should quote test rows.
    **{f"gain_over_base_{split}": _gain(split) for split in SCORED},
}
PACK_METRICS: Mapping[str, Metric[Sequence[UserReport]]] = {
    "users_trained": _count("users trained or judged again", lambda user: user.status == "trained"),
    "users_promoted": _count("of these, promoted", lambda user: user.decision == "promoted"),
    "users_failed": _count("users who failed", lambda user: user.status == "failed"),
    **{f"nll_{name}_valid_median": _loss_median(name) for name in LOSS_NAMES},
}


def worker_metrics(result: PackResult) -> dict[str, float]:
    """What a worker measures of one user; kept in the pack's record as `UserReport.measured`."""
    return _compute(WORKER_METRICS, result)


def user_metrics(report: UserReport) -> dict[str, float]:
    """A version's metrics for a reviewer. Raises RunError for a loss that no metric reports."""
    unknown = sorted(report.losses.keys() - set(LOSS_NAMES))
    if unknown:
        raise RunError(
            "a loss has a name that no report knows",
            seen=", ".join(unknown),
            expected=", ".join(LOSS_NAMES),
            fix="declare it in pipelines/report/metrics.py",
        )
    return {**_compute(USER_METRICS, report), **report.measured}


def pack_metrics(reports: Sequence[UserReport]) -> dict[str, float]:
    """A pack's metrics, for its MLflow run."""
    return _compute(PACK_METRICS, reports)


def _compute(declared: Mapping[str, Metric[_Of]], of: _Of) -> dict[str, float]:
    found = {name: metric.value(of) for name, metric in declared.items()}
    return {name: value for name, value in found.items() if value is not None}
