"""Every figure that a run reports, by name: the one place in which a new one is declared.

Registry, users table and reports take their names from here, and a name that is not here is
refused, so that a misspelt figure cannot vanish into a column nobody reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ptuning.errors import RunError
from ptuning.types import Split

WHO = ("base", "champion", "candidate", "public", "other")  # whose loss it is
SCORED: tuple[Split, ...] = ("valid", "test")

_WHOSE = {
    "base": "the base model",
    "champion": "the prefix that the user had",
    "candidate": "the prefix that this run trained or judged",
    "public": "the public prefix",
    "other": "another user's prefix",
}

# Of one user: tags of a version; the losses are columns of the users table too.
USER_METRICS: Mapping[str, str] = {
    "steps": "optimiser steps",
    "tokens": "tokens trained on",
    **{
        f"nll_{who}_{split}": f"nats per completion token of {_WHOSE[who]} on {split} rows"
        for split in SCORED
        for who in WHO
    },
    **{
        f"gain_over_base_{split}": f"nats per completion token saved on {split} rows"
        for split in SCORED
    },
}
# Of one pack: metrics of its MLflow run.
PACK_METRICS: Mapping[str, str] = {
    "users_trained": "users trained or judged again",
    "users_promoted": "of these, promoted",
    "users_failed": "users who failed",
    **{f"nll_{who}_valid_median": f"median loss of {_WHOSE[who]} on valid rows" for who in WHO},
}

_Figures = TypeVar("_Figures", bound=Mapping[str, object])


def check_names(figures: _Figures) -> _Figures:
    """The figures, if each has a name of this module. Raises RunError."""
    unknown = sorted(set(figures) - USER_METRICS.keys() - PACK_METRICS.keys())
    if unknown:
        raise RunError(
            "a figure has a name that no report knows",
            seen=", ".join(unknown),
            expected="a name of USER_METRICS or PACK_METRICS",
            fix="declare it in pipelines/report/metrics.py",
        )
    return figures
