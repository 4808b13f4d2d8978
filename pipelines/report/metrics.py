"""The names of all metrics that a run reports; a new metric is declared here.

The registry takes its names from here, and so do the loss columns of the users table. Unknown names
are refused, so that a misspelt metric cannot end up in a column that nobody reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ptuning.errors import RunError
from ptuning.types import Split

LOSS_NAMES = ("base", "champion", "candidate", "public", "other")  # what is scored
SCORED: tuple[Split, ...] = ("valid", "test")

_LOSS_TEXTS = {
    "base": "the base model",
    "champion": "the prefix that the user had",
    "candidate": "the prefix that this run trained or judged",
    "public": "the public prefix",
    "other": "another user's prefix",
}

# Per user: tags of a version. The losses are columns of the users table too.
USER_METRICS: Mapping[str, str] = {
    "steps": "optimiser steps",
    "tokens": "tokens trained on",
    **{
        f"nll_{name}_{split}": f"nats per completion token of {_LOSS_TEXTS[name]} on {split} rows"
        for split in SCORED
        for name in LOSS_NAMES
    },
    **{
        f"gain_over_base_{split}": f"nats per completion token saved on {split} rows"
        for split in SCORED
    },
}
# Per pack: metrics of its MLflow run.
PACK_METRICS: Mapping[str, str] = {
    "users_trained": "users trained or judged again",
    "users_promoted": "of these, promoted",
    "users_failed": "users who failed",
    **{
        f"nll_{name}_valid_median": f"median loss of {_LOSS_TEXTS[name]} on valid rows"
        for name in LOSS_NAMES
    },
}

_Metrics = TypeVar("_Metrics", bound=Mapping[str, object])


def check_names(metrics: _Metrics, declared: Mapping[str, str]) -> _Metrics:
    """The metrics, after checking that their names are `declared` (USER_METRICS or PACK_METRICS).
    Raises RunError."""
    unknown = sorted(set(metrics) - declared.keys())
    if unknown:
        raise RunError(
            "a metric has a name that no report knows",
            seen=", ".join(unknown),
            expected=", ".join(declared),
            fix="declare it in pipelines/report/metrics.py",
        )
    return metrics
