"""Counters, gauges and histograms of one process, and their Prometheus text.

A few lines of code instead of a client library's global registry, because the snapshots of all
replicas are sent to the HTTP side as plain values. A user is never a label. To add a metric, add a
line to FAMILIES; undeclared names are refused.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[tuple[str, str], ...]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0)

FAMILIES: dict[str, tuple[Kind, str]] = {
    "ptuning_requests_total": ("counter", "Requests answered, by endpoint and HTTP status"),
    "ptuning_stream_errors_total": ("counter", "Streams that failed after they had begun"),
    "ptuning_tokens_generated_total": ("counter", "Tokens generated"),
    "ptuning_prompt_tokens_total": ("counter", "Prompt tokens computed"),
    "ptuning_requests_cancelled_total": ("counter", "Requests whose client left"),
    "ptuning_step_errors_total": ("counter", "Forward passes that failed"),
    "ptuning_row_errors_total": ("counter", "Answers that could not be decoded"),
    "ptuning_engine_deaths_total": ("counter", "Engine threads that ended with an error"),
    "ptuning_prefix_cache_hits_total": ("counter", "Prefixes found in memory"),
    "ptuning_prefix_cache_misses_total": ("counter", "Prefixes that had to be read"),
    "ptuning_prefix_errors_total": ("counter", "Prefix files that could not be used"),
    "ptuning_champions_errors_total": ("counter", "Polls of the champions' list that failed"),
    "ptuning_rows_in_use": ("gauge", "Rows being decoded"),
    "ptuning_rows_limit": ("gauge", "Maximum rows that are decoded together"),
    "ptuning_queue_length": ("gauge", "Requests waiting for a row"),
    "ptuning_prefix_cache_bytes": ("gauge", "Bytes of prefixes in memory"),
    "ptuning_champions_generation": ("gauge", "Published generation that is being served"),
    "ptuning_champions_age_seconds": ("gauge", "Since the list was last known to be current"),
    "ptuning_replicas": ("gauge", "Engine replicas that answered"),
    "ptuning_step_rows": ("histogram", "Rows per decoding step"),
    "ptuning_time_to_first_token_seconds": ("histogram", "From arrival at the engine"),
}
# Reported by the HTTP side; engine replicas report all others.
HTTP_FAMILIES = ("ptuning_requests_total", "ptuning_stream_errors_total", "ptuning_replicas")
ENGINE_FAMILIES = tuple(name for name in FAMILIES if name not in HTTP_FAMILIES)
# The labels of a family, besides those that identify the process.
LABELS: dict[str, tuple[str, ...]] = {"ptuning_requests_total": ("endpoint", "status")}
BUCKETS = {"ptuning_step_rows": ROWS, "ptuning_time_to_first_token_seconds": SECONDS}


@dataclass
class Distribution:
    """A histogram: `counts[i]` observations in bucket i; the last bucket has no upper bound."""

    counts: list[int]
    total: float = 0.0


@dataclass
class Snapshot:
    """All values of one process at one time, with labels that identify the process."""

    labels: Labels = ()
    values: dict[tuple[str, Labels], float] = field(default_factory=dict)
    distributions: dict[str, Distribution] = field(default_factory=dict)


class Metrics:
    """One process's values; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, Labels], float] = {}
        self._distributions: dict[str, Distribution] = {}
        for name, (kind, _) in FAMILIES.items():
            if kind == "histogram":
                self._distributions[name] = Distribution([0] * (len(BUCKETS[name]) + 1))

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Increase a counter. Raises ValueError for an undeclared counter or wrong labels."""
        _check(name, "counter", tuple(labels))
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def observe(self, name: str, value: float) -> None:
        """Add an observation to a histogram. Raises ValueError for an undeclared histogram."""
        _check(name, "histogram")
        with self._lock:
            distribution = self._distributions[name]
            distribution.counts[bisect_left(BUCKETS[name], value)] += 1
            distribution.total += value

    def snapshot(
        self, gauges: Mapping[str, float], names: Iterable[str], **labels: str
    ) -> Snapshot:
        """The current values. `names` are the families that this process reports, even at zero.

        Raises ValueError for an undeclared name.
        """
        names = set(names)
        for name in names:
            _check(name)
        for name in gauges:
            _check(name, "gauge")
        with self._lock:
            values: dict[tuple[str, Labels], float] = {
                (name, ()): 0.0
                for name in names
                if FAMILIES[name][0] == "counter" and name not in LABELS
            }
            values.update(self._values)
            values.update({(name, ()): value for name, value in gauges.items()})
            distributions = {
                name: Distribution(list(distribution.counts), distribution.total)
                for name, distribution in self._distributions.items()
                if name in names
            }
        return Snapshot(tuple(sorted(labels.items())), values, distributions)


def _check(name: str, kind: Kind | None = None, labels: tuple[str, ...] | None = None) -> None:
    """Raise ValueError for an undeclared name, which would be counted but never shown: a mistake in
    our code, not an error that a user is answered with."""
    declared = FAMILIES.get(name)
    if declared is None or kind not in (None, declared[0]):
        known = ", ".join(_names_of(kind))
        raise ValueError(f"serve/metrics.py declares no {kind or 'metric'} {name!r}, but {known}")
    if labels is not None and set(labels) != set(LABELS.get(name, ())):
        raise ValueError(f"{name} has the labels {LABELS.get(name, ())}, not {labels}")


def _names_of(kind: Kind | None) -> list[str]:
    return [name for name, (declared, _) in FAMILIES.items() if kind in (None, declared)]


def render(snapshots: Iterable[Snapshot]) -> str:
    """Prometheus text (exposition format 0.0.4) of all processes."""
    lines: dict[str, list[str]] = {}
    for snapshot in snapshots:
        for (name, labels), value in sorted(snapshot.values.items()):
            lines.setdefault(name, []).append(_line(name, (*snapshot.labels, *labels), value))
        for name, distribution in sorted(snapshot.distributions.items()):
            lines.setdefault(name, []).extend(_histogram(name, snapshot.labels, distribution))
    out: list[str] = []
    for name in FAMILIES:
        if name in lines:
            kind, text = FAMILIES[name]
            out += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *lines[name]]
    return "\n".join(out) + "\n"


def _histogram(name: str, labels: Labels, distribution: Distribution) -> list[str]:
    out, running = [], 0
    for bound, count in zip((*BUCKETS[name], None), distribution.counts, strict=True):
        running += count
        limit = "+Inf" if bound is None else f"{bound:g}"
        out.append(_line(f"{name}_bucket", (*labels, ("le", limit)), running))
    out.append(_line(f"{name}_sum", labels, distribution.total))
    return [*out, _line(f"{name}_count", labels, running)]


def _line(name: str, labels: Labels, value: float) -> str:
    label_text = ",".join(f'{key}="{_escape(text)}"' for key, text in labels)
    number = repr(int(value)) if value == int(value) else repr(float(value))
    return f"{name}{{{label_text}}} {number}" if label_text else f"{name} {number}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
