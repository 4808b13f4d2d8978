"""What a run says at its end: summary.json, the users table and the terminal's report.

The page is pipelines/report/page.py, the bar while it works pipelines/report/progress.py.

Everything is computed from one value, `RunFacts`; nothing here reads a store or a registry,
so a report can be made again from what was committed. The price is that all users' reports
are in memory at once (some kilobytes each), which the table of users needs anyway.

A user's id stands in the table only. The summary, the terminal and the page say the user's
key, and an id that an error message quotes is taken out before it is shown.
"""

from __future__ import annotations

import math
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

from pipelines.report.metrics import SCORED, WHO
from ptuning.errors import RunError
from ptuning.system.redaction import hide_passwords, hide_user
from ptuning.types import SPLITS, UserReport, user_key

STAGES = ("start", "partition", "plan", "tune", "evaluate", "register", "deploy")
STATUSES = ("trained", "unchanged", "too_few", "retired", "failed")
DECISIONS = ("promoted", "rejected", "pending")

FAILURES_KEPT = 100  # in summary.json
FAILURES_SHOWN = 5  # on the terminal


class BadFile(Protocol):
    """Quarantined rows of one file, and their most frequent reasons with counts."""

    @property
    def file(self) -> str: ...

    @property
    def rows(self) -> int: ...

    @property
    def reasons(self) -> Sequence[tuple[str, int]]: ...


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """All that a report is made from.

    `users` are (user_id, report) of every user in the run's partitions, and of those who retired
    because they are in none, whose id is None; `users_total` is their number by the index and the
    plan, and is checked against `users`. `key_of` is how the store makes a key from an id.
    `split_rows[user_key][split]` counts rows. `seconds` has a value for each stage that ran,
    and `total` (without it: the stages' sum). `notices` and `bad_files` say what was skipped and
    what was taken for granted. `options` are what the next command needs besides `--store`; with
    `store`, `registry_uri` and `report_path` they are only printed.
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


def summary(facts: RunFacts) -> dict[str, Any]:
    """summary.json as design.md has it; raises RunError where its sums do not hold.

    Losses are nats per completion token: medians over trained users, None without any.
    `users` adds up: total = trained + unchanged + too_few + retired + failed, and trained =
    promoted + rejected + pending. Users whose prefix is unchanged, but was judged by another gate
    than before, are unchanged there and counted by decision in `judged_again`.
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
            "error": hide_user(report.error or "no reason was kept", user_id or ""),
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
    """Unchanged users with a decision: another gate judged the prefix they have."""
    decisions = Counter[str](
        report.decision
        for _, report in facts.users
        if report.status == "unchanged" and report.decision
    )
    return {decision: decisions[decision] for decision in DECISIONS}


def _check_sum(facts: RunFacts, counts: dict[str, int], whole: str, parts: Iterable[str]) -> None:
    if counts[whole] == sum(counts[part] for part in parts):
        return
    raise RunError(
        f"The run's users do not add up: {whole} must be {' + '.join(parts)}",
        seen=", ".join(f"{name} {counts[name]}" for name in (whole, *parts)),
        expected="every user of the partitions with one report, every trained one decided",
        fix="run `ptuning run` with the same arguments again: it resumes what is missing",
        run_id=facts.run_id,
    )


def _check_identity(facts: RunFacts) -> None:
    """Each report is its own user's, and no user has two."""
    seen: set[str] = set()
    for user_id, report in facts.users:
        twice = report.user_key in seen
        if twice or (user_id is not None and report.user_key != facts.key_of(user_id)):
            raise RunError(
                "A user has two reports" if twice else "A report is under another user's id",
                seen=report.user_key,
                expected="one report per user, under the key made from the user's id",
                run_id=facts.run_id,
            )
        seen.add(report.user_key)


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
        who: _median(nll(report, who, split) for report in trained_users(facts))
        for who in ("base", "candidate")
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def trained_users(facts: RunFacts) -> Iterator[UserReport]:
    return (report for _, report in facts.users if report.status == "trained")


def nll(report: UserReport, who: str, split: str) -> float | None:
    """Nats per completion token of base, champion, candidate or other; None if not measured.

    A loss that is not finite is None too: JSON has no word for it.
    """
    losses = report.losses.get(who, {}).get(split)
    value = losses.nll if losses is not None else None
    return value if value is not None and math.isfinite(value) else None


# ---------------------------------------------------------------- the users table

USERS_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),  # none: the user retired, and is in no row any more
        pa.field("user_key", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("decision", pa.string()),
        pa.field("digest", pa.string()),
        *(pa.field(f"rows_{split}", pa.int64()) for split in SPLITS),
        *(pa.field(f"nll_{who}_{split}", pa.float64()) for split in SCORED for who in WHO),
        pa.field("steps", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("reason", pa.string()),
    ]
)


def users_table(facts: RunFacts) -> pa.Table:
    """One row per user, in the order given. Losses in nats per completion token."""
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
        **{f"rows_{split}": counts.get(split) for split in SPLITS},
        **{f"nll_{who}_{split}": nll(report, who, split) for who in WHO for split in SCORED},
    }


def reason_of(report: UserReport) -> str | None:
    """Why the user came out as they did: the failure, the gate's words, or what is missing."""
    if report.status == "failed":
        return f"{report.stage or 'unknown stage'}: {report.error or 'no reason was kept'}"
    if report.gate is not None:
        return report.gate.reason
    return {
        "too_few": "too few rows to train on; the base model answers",
        "retired": "the rows are gone, or too few are left; the base model answers",
        "unchanged": "nothing that the prefix depends on has changed",
    }.get(report.status)


# ---------------------------------------------------------------- figures both reports show


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How trained users fare on validation rows. Shares are of the users measured."""

    base: float | None
    own: float | None
    other: float | None
    beat_base: float | None
    beat_other: float | None
    users: int


def shares(facts: RunFacts) -> Shares:
    """Medians, and how often a user's own prefix beats the base and another user's."""
    reports = list(trained_users(facts))
    return Shares(
        base=_median(nll(report, "base", "valid") for report in reports),
        own=_median(nll(report, "candidate", "valid") for report in reports),
        other=_median(nll(report, "other", "valid") for report in reports),
        beat_base=_share_better(reports, "base"),
        beat_other=_share_better(reports, "other"),
        users=len(reports),
    )


def _share_better(reports: list[UserReport], than: str) -> float | None:
    pairs = [
        (own, their)
        for report in reports
        if (own := nll(report, "candidate", "valid")) is not None
        and (their := nll(report, than, "valid")) is not None
    ]
    return sum(own < their for own, their in pairs) / len(pairs) if pairs else None


def stage_rates(facts: RunFacts) -> dict[str, str]:
    """What each stage got through per second, in the unit that drives its cost."""
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
    """(what, command or place) of what a person does after a run; commands can be pasted."""
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
    """A page for a person: outcomes, losses, time, failures, where to look next."""
    # Text, never markup: an error message may hold brackets.
    result = summary(facts)
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
        gone = "rows gone or too few now: the base model answers"
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
    table.add_row("own prefix", Text(loss_text(found.own), style="bold green"), "")
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
    told = ", ".join(f"{again[decision]:,} {decision}" for decision in DECISIONS)
    return f"no new rows; judged again by another gate: {told}"


def _print_notices(console: Console, facts: RunFacts) -> None:
    for line in notice_lines(facts):
        console.print(Text("note: ", style="yellow") + Text(line), soft_wrap=True)
    console.print()


def notice_lines(facts: RunFacts) -> list[str]:
    """What was skipped, file by file with the reasons, and what was taken for granted."""
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
