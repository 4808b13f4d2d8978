"""A run's results: summary.json, the users table and the terminal report.

The HTML page is in pipelines/report/page.py, the progress bar in pipelines/report/progress.py.

Everything is computed from one value, `RunFacts`, without reading a store or a registry, so a
report can be made again from committed data. The trade-off: all users' reports are in memory at
once (a few kilobytes each), which the users table needs anyway.

User ids appear in the table only. The summary, the terminal and the page show user keys, and an id
that an error message quotes is removed before display.
"""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.report.metrics import LOSS_NAMES, SCORED, WORKER_METRICS, nll
from ptuning.errors import RunError
from ptuning.system.redaction import hide_passwords, hide_user
from ptuning.types import SPLITS, UserReport, user_key

STAGES = ("start", "partition", "plan", "tune", "evaluate", "register", "deploy")
STATUSES = ("trained", "unchanged", "too_few", "retired", "failed")
DECISIONS = ("promoted", "rejected", "pending")

FAILURES_KEPT = 100  # in summary.json
FAILURES_SHOWN = 5  # on the terminal


class BadFile(Protocol):
    """The number of quarantined rows in a file, and the most frequent reasons with counts."""

    @property
    def file(self) -> str: ...

    @property
    def rows(self) -> int: ...

    @property
    def reasons(self) -> Sequence[tuple[str, int]]: ...


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Everything that the reports are made from.

    `users` are (user_id, report) of every user in the run's partition, and of users who retired
    because they are no longer in it, with None as id. `users_total` is their number according to
    the index and the plan, which is checked against `users`. `key_of` is the store's function from
    ids to keys. `split_rows[user_key][split]` counts rows. `seconds` has a value for each stage
    that ran, and `total` (default: the sum of the stages). `notices` and `bad_files` say what was
    skipped or assumed. `options` are the arguments of the next command besides `--store`; they are
    only printed, like `store`, `registry_uri` and `report_path`.
    """

    run_id: str
    users: Sequence[tuple[str | None, UserReport]]
    users_total: int
    rows_read: int
    rows_kept: int
    rows_quarantined: int
    tokens_trained: int
    seconds: Mapping[str, float]
    split_rows: Mapping[str, Mapping[Any, int]] = field(default_factory=dict)
    notices: Sequence[str] = ()
    bad_files: Sequence[BadFile] = ()
    key_of: Callable[[str], str] = user_key
    options: Sequence[str] = ()
    store: str = ""
    registry_uri: str = ""
    report_path: str = ""


# ---------------------------------------------------------------- summary.json


def make_summary(facts: RunFacts) -> dict[str, Any]:
    """The contents of summary.json; raises RunError if the counts do not add up.

    Losses are in nats per completion token: medians over trained users, or None without any.
    In `users`, total = trained + unchanged + too_few + retired + failed, and trained = promoted +
    rejected + pending. Users with an unchanged prefix that a changed gate judged again count as
    unchanged there, and by decision in `judged_again`.
    """
    result: dict[str, Any] = {
        "run_id": facts.run_id,
        "users": _counts(facts),
        "judged_again": _judged_again(facts),
        "rows": {
            "read": facts.rows_read,
            "kept": facts.rows_kept,
            "quarantined": facts.rows_quarantined,
        },
        "tokens_trained": facts.tokens_trained,
        "seconds": _seconds(facts),
        "nll": _medians(facts, "valid"),
        "failures": failures(facts)[:FAILURES_KEPT],
    }
    on_test = _medians(facts, "test")
    if any(value is not None for value in on_test.values()):
        result["nll_test"] = on_test
    return result


def failures(facts: RunFacts) -> list[dict[str, str]]:
    """Failed users by key, in a fixed order: {user_key, stage, error}, never the id."""
    found = [
        {
            "user_key": report.user_key,
            "stage": report.stage or "unknown",
            "error": hide_user(report.error or "no reason was recorded", user_id or ""),
        }
        for user_id, report in facts.users
        if report.status == "failed"
    ]
    return sorted(found, key=lambda failure: failure["user_key"])


def _counts(facts: RunFacts) -> dict[str, int]:
    _check_identity(facts)
    statuses = Counter[str](report.status for _, report in facts.users)
    decisions = Counter[str](report.decision for report in trained_users(facts) if report.decision)
    counts = {"total": facts.users_total}
    counts |= {status: statuses[status] for status in STATUSES}
    counts |= {decision: decisions[decision] for decision in DECISIONS}
    _check_sum(facts, counts, "total", STATUSES)
    _check_sum(facts, counts, "trained", DECISIONS)
    return counts


def _judged_again(facts: RunFacts) -> dict[str, int]:
    """Decisions of unchanged users, whose existing prefix was judged by a changed gate."""
    decisions = Counter[str](
        report.decision
        for _, report in facts.users
        if report.status == "unchanged" and report.decision
    )
    return {decision: decisions[decision] for decision in DECISIONS}


def _check_sum(facts: RunFacts, counts: dict[str, int], total: str, parts: Iterable[str]) -> None:
    if counts[total] == sum(counts[part] for part in parts):
        return
    raise RunError(
        f"The run's users do not add up: {total} must be {' + '.join(parts)}",
        seen=", ".join(f"{name} {counts[name]}" for name in (total, *parts)),
        expected="one report for every user of the partition, and a decision for every trained one",
        fix="repeat `ptuning run` with the same arguments: it resumes what is missing",
        run_id=facts.run_id,
    )


def _check_identity(facts: RunFacts) -> None:
    """Raise RunError unless each report is under its user's id and no user has two."""
    known: set[str] = set()
    for user_id, report in facts.users:
        twice = report.user_key in known
        if twice or (user_id is not None and report.user_key != facts.key_of(user_id)):
            raise RunError(
                "A user has two reports" if twice else "A report is under another user's id",
                seen=report.user_key,
                expected="one report per user, under the key made from the user's id",
                run_id=facts.run_id,
            )
        known.add(report.user_key)


def _seconds(facts: RunFacts) -> dict[str, float]:
    unknown = sorted(set(facts.seconds) - {*STAGES, "total"})
    if unknown:
        raise RunError(
            "Seconds were measured for a stage that the summary does not have",
            seen=", ".join(unknown),
            expected=", ".join((*STAGES, "total")),
            run_id=facts.run_id,
        )
    seconds = {stage: round(facts.seconds.get(stage, 0.0), 3) for stage in STAGES}
    return seconds | {"total": round(facts.seconds.get("total", sum(seconds.values())), 3)}


def _medians(facts: RunFacts, split: str) -> dict[str, float | None]:
    return {
        name: _median(nll(report, name, split) for report in trained_users(facts))
        for name in ("base", "candidate")
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def trained_users(facts: RunFacts) -> Iterator[UserReport]:
    return (report for _, report in facts.users if report.status == "trained")


# ---------------------------------------------------------------- the users table

USERS_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),  # null: the user retired and has no rows any more
        pa.field("user_key", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("decision", pa.string()),
        pa.field("digest", pa.string()),
        *(pa.field(f"rows_{split}", pa.int64()) for split in SPLITS),
        *(pa.field(f"nll_{name}_{split}", pa.float64()) for split in SCORED for name in LOSS_NAMES),
        pa.field("steps", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        *(pa.field(name, pa.float64()) for name in WORKER_METRICS),
        pa.field("reason", pa.string()),
    ]
)


def users_table(facts: RunFacts) -> pa.Table:
    """One row per user, in the given order. Losses are in nats per completion token."""
    rows = [_user_row(user_id, report, facts) for user_id, report in facts.users]
    return pa.Table.from_pylist(rows, schema=USERS_SCHEMA)


def _user_row(user_id: str | None, report: UserReport, facts: RunFacts) -> dict[str, Any]:
    counts = facts.split_rows.get(report.user_key, {})
    return {
        "user_id": user_id,
        "user_key": report.user_key,
        "status": report.status,
        "decision": report.decision,
        "digest": report.digest,
        "steps": report.steps,
        "tokens": report.tokens,
        "reason": reason_of(report),
        **{name: report.measured.get(name) for name in WORKER_METRICS},
        **{f"rows_{split}": counts.get(split) for split in SPLITS},
        **{
            f"nll_{name}_{split}": nll(report, name, split)
            for name in LOSS_NAMES
            for split in SCORED
        },
    }


def reason_of(report: UserReport) -> str | None:
    """The reason for a user's outcome: the failure, the gate's reason, or that of the status."""
    if report.status == "failed":
        return f"{report.stage or 'unknown stage'}: {report.error or 'no reason was recorded'}"
    if report.gate is not None:
        return report.gate.reason
    return {
        "too_few": "too few rows to train on; the base model answers",
        "retired": "the rows are gone or too few; the base model answers",
        "unchanged": "nothing that the prefix depends on has changed",
    }.get(report.status)


# ---------------------------------------------------------------- shared by both reports


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Median losses on validation rows, and shares of the measured users."""

    base: float | None
    candidate: float | None
    other: float | None
    beat_base: float | None
    beat_other: float | None
    users: int


def shares(facts: RunFacts) -> Shares:
    """Medians, and how often a user's prefix beats the base model and another user's prefix."""
    reports = list(trained_users(facts))
    return Shares(
        base=_median(nll(report, "base", "valid") for report in reports),
        candidate=_median(nll(report, "candidate", "valid") for report in reports),
        other=_median(nll(report, "other", "valid") for report in reports),
        beat_base=_share_better(reports, "base"),
        beat_other=_share_better(reports, "other"),
        users=len(reports),
    )


def _share_better(reports: list[UserReport], rival: str) -> float | None:
    pairs = [
        (candidate, other)
        for report in reports
        if (candidate := nll(report, "candidate", "valid")) is not None
        and (other := nll(report, rival, "valid")) is not None
    ]
    return sum(candidate < other for candidate, other in pairs) / len(pairs) if pairs else None


def stage_rates(facts: RunFacts) -> dict[str, str]:
    """Each stage's throughput per second, in the unit that determines its cost."""
    amounts = {
        "partition": (facts.rows_read, "rows/s"),
        "tune": (facts.tokens_trained, "tokens/s"),
        "register": (sum(1 for _ in trained_users(facts)), "users/s"),
    }
    seconds = _seconds(facts)
    return {
        stage: f"{number_text(amount / seconds[stage])} {unit}"
        for stage, (amount, unit) in amounts.items()
        if amount and seconds[stage] > 0
    }


def next_steps(facts: RunFacts) -> list[tuple[str, str]]:
    """Next steps after a run, as (purpose, command or location); commands can be pasted."""
    steps = []
    if facts.store:
        options = shlex.join(["--store", facts.store, *facts.options])
        steps.append(("answer as these users", f"ptuning serve {options}"))
        steps.append(("ask as one of them", f'ptuning generate {options} --user ID "your prompt"'))
    if facts.registry_uri:
        uri = hide_passwords(facts.registry_uri)
        command = f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        steps.append(("models and metrics", uri if uri.startswith("http") else command))
    if facts.report_path:
        steps.append(("this report", facts.report_path))
    return steps


def number_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def loss_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def percent_text(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def duration_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


# ---------------------------------------------------------------- the terminal


def print_report(console: Console, facts: RunFacts) -> None:
    """Print the report: outcomes, losses, time, failures, next steps."""
    # Text, not markup: an error message may contain brackets.
    result = make_summary(facts)
    console.print(Text(f"Run {facts.run_id}", style="bold"), end="\n\n")
    losses = _losses(shares(facts), result.get("nll_test"))
    for table in (_outcomes(result), losses, _stages(facts, result)):
        console.print(table)
        console.print()
    _print_failures(console, result)
    _print_notices(console, facts)
    for what, where in next_steps(facts):
        console.print(Text(f"{what}: ", style="dim") + Text(where), soft_wrap=True)


def _grid(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left")
    return table


def _outcomes(result: dict[str, Any]) -> Table:
    users, rows = result["users"], result["rows"]
    table = _grid(("users", "left"), ("", "right"), ("of these", "left"))
    trained = ", ".join(f"{users[decision]:,} {decision}" for decision in DECISIONS)
    table.add_row("trained", f"{users['trained']:,}", trained)
    table.add_row("unchanged", f"{users['unchanged']:,}", _unchanged_text(result))
    table.add_row("too few", f"{users['too_few']:,}", "too few rows to train on")
    if users["retired"]:
        gone = "rows gone or too few: the base model answers"
        table.add_row("retired", f"{users['retired']:,}", gone, style="yellow")
    style = "red" if users["failed"] else ""
    table.add_row(Text("failed", style=style), Text(f"{users['failed']:,}", style=style), "")
    used = f"{rows['read']:,} rows read, {rows['quarantined']:,} quarantined"
    table.add_row("total", f"{users['total']:,}", used, style="bold")
    return table


def _losses(found: Shares, on_test: dict[str, float | None] | None) -> Table:
    table = _grid(("loss, nats per token (median)", "left"), ("", "right"), ("", "left"))
    table.add_row("base model", loss_text(found.base), "")
    if found.other is not None:
        table.add_row("another user's prefix", loss_text(found.other), "")
    table.add_row("own prefix", Text(loss_text(found.candidate), style="bold green"), "")
    table.add_row("own beats the base", percent_text(found.beat_base), "of trained users")
    if found.beat_other is not None:
        table.add_row(
            "own beats another user's", percent_text(found.beat_other), "of trained users"
        )
    if on_test:
        before, after = loss_text(on_test["base"]), loss_text(on_test["candidate"])
        table.add_row("on test rows", f"{before} → {after}", "base → own")
    return table


def _stages(facts: RunFacts, result: dict[str, Any]) -> Table:
    rates = stage_rates(facts)
    table = _grid(("time", "left"), ("", "right"), ("", "left"))
    for stage in STAGES:
        if result["seconds"][stage] > 0:
            table.add_row(stage, duration_text(result["seconds"][stage]), rates.get(stage, ""))
    trained = f"{facts.tokens_trained:,} tokens trained"
    table.add_row("total", duration_text(result["seconds"]["total"]), trained, style="bold")
    return table


def _unchanged_text(result: dict[str, Any]) -> str:
    again = result["judged_again"]
    if not sum(again.values()):
        return "no new rows since their last run"
    counts = ", ".join(f"{again[decision]:,} {decision}" for decision in DECISIONS)
    return f"no new rows; judged again by a changed gate: {counts}"


def _print_notices(console: Console, facts: RunFacts) -> None:
    for line in notice_lines(facts):
        console.print(Text("note: ", style="yellow") + Text(line), soft_wrap=True)
    console.print()


def notice_lines(facts: RunFacts) -> list[str]:
    """Notices, and for each file with bad rows how many and why."""
    bad = [
        f"{bad.file}: {bad.rows:,} rows quarantined, most often "
        + ", ".join(f"{reason} ({count:,})" for reason, count in bad.reasons)
        for bad in facts.bad_files
    ]
    return [*facts.notices, *bad]


def _print_failures(console: Console, result: dict[str, Any]) -> None:
    found, failed = result["failures"], result["users"]["failed"]
    for failure in found[:FAILURES_SHOWN]:
        head = f"failed {failure['user_key'][:12]} in {failure['stage']}: "
        console.print(Text(head, style="red") + Text(failure["error"]), soft_wrap=True)
    if failed > FAILURES_SHOWN:
        more = failed - FAILURES_SHOWN
        console.print(Text(f"and {more:,} more in the run's users table", style="red"))
    if found:
        console.print()
