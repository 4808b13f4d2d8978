"""What a run says at its end: summary.json, users.parquet, the terminal and report.html.

Everything is computed from one value, `RunFacts`; nothing here reads a store or a registry,
so a report can be made again from what was committed. The price is that all users' reports
are in memory at once (some kilobytes each), which the table of users needs anyway.

A user's id stands in the table only. The summary, the terminal and the page say the user's
key, and an id that an error message quotes is taken out before it is shown.
"""

from __future__ import annotations

import html
import io
import math
import re
import shlex
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ptuning.errors import RunError
from ptuning.types import SPLITS, UserReport, user_key

STAGES = ("start", "partition", "plan", "tune", "evaluate", "register", "deploy")
STATUSES = ("trained", "unchanged", "too_few", "failed")
DECISIONS = ("promoted", "rejected", "pending")
WHO = ("base", "champion", "candidate", "other")

FAILURES_SHOWN = 5  # on the terminal
USERS_SHOWN = 200  # in the page
DUMBBELLS_SHOWN = 40  # above this, the page draws a histogram of gains


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """All that a report is made from.

    `users` are (user_id, report) of every user in the run's partitions; `users_total` is
    their number as the partitions' index has it, and is checked against `users`.
    `split_rows[user_key][split]` counts rows. `seconds` has a value for each stage that ran,
    and `total` (without it: the stages' sum). `store`, `registry_uri` and `report_path` are
    only printed.
    """

    run_id: str
    users: Sequence[tuple[str, UserReport]]
    users_total: int
    rows_read: int
    rows_kept: int
    rows_quarantined: int
    tokens_trained: int
    seconds: Mapping[str, float]
    split_rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    store: str = ""
    registry_uri: str = ""
    report_path: str = ""


# ---------------------------------------------------------------- summary.json


def summary(facts: RunFacts) -> dict[str, Any]:
    """summary.json as design.md has it; raises RunError where its sums do not hold.

    Losses are nats per completion token: medians over trained users, None without any.
    """
    result: dict[str, Any] = {
        "run_id": facts.run_id,
        "users": _counts(facts),
        "rows": {
            "read": facts.rows_read,
            "kept": facts.rows_kept,
            "quarantined": facts.rows_quarantined,
        },
        "tokens_trained": facts.tokens_trained,
        "seconds": _seconds(facts),
        "nll": _medians(facts, "valid"),
        "failures": failures(facts),
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
            "error": redact(report.error or "no reason was kept", user_id),
        }
        for user_id, report in facts.users
        if report.status == "failed"
    ]
    return sorted(found, key=lambda failure: failure["user_key"])


def redact(text: str, user_id: str) -> str:
    """The text without the user's id, which an error may quote plainly or as a literal."""
    for form in {user_id, repr(user_id)[1:-1]}:
        # Whole words only: the id "a" must not eat the letters of the message.
        text = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", "<user>", text)
    return text


def _counts(facts: RunFacts) -> dict[str, int]:
    _check_identity(facts)
    statuses = Counter[str](report.status for _, report in facts.users)
    decisions = Counter[str](report.decision for _, report in facts.users if report.decision)
    counts = {"total": facts.users_total}
    counts |= {status: statuses[status] for status in STATUSES}
    counts |= {decision: decisions[decision] for decision in DECISIONS}
    _check_sum(facts, counts, "total", STATUSES)
    _check_sum(facts, counts, "trained", DECISIONS)
    return counts


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
        if report.user_key != user_key(user_id) or report.user_key in seen:
            twice = report.user_key in seen
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
        who: _median(nll(report, who, split) for report in _trained(facts))
        for who in ("base", "candidate")
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _trained(facts: RunFacts) -> Iterator[UserReport]:
    return (report for _, report in facts.users if report.status == "trained")


def nll(report: UserReport, who: str, split: str) -> float | None:
    """Nats per completion token of base, champion, candidate or other; None if not measured.

    A loss that is not finite is None too: JSON has no word for it.
    """
    losses = report.losses.get(who, {}).get(split)
    value = losses.nll if losses is not None else None
    return value if value is not None and math.isfinite(value) else None


# ---------------------------------------------------------------- users.parquet

USERS_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("user_key", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("decision", pa.string()),
        pa.field("digest", pa.string()),
        *(pa.field(f"rows_{split}", pa.int64()) for split in SPLITS),
        *(
            pa.field(f"nll_{who}_{split}", pa.float64())
            for split in ("valid", "test")
            for who in WHO
        ),
        pa.field("steps", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("gate_reason", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("error", pa.string()),
    ]
)


def users_table(facts: RunFacts) -> pa.Table:
    """users.parquet: one row per user, in the order given. Losses in nats per token."""
    rows = [_user_row(user_id, report, facts) for user_id, report in facts.users]
    return pa.Table.from_pylist(rows, schema=USERS_SCHEMA)


def _user_row(user_id: str, report: UserReport, facts: RunFacts) -> dict[str, Any]:
    counts = facts.split_rows.get(report.user_key, {})
    return {
        "user_id": user_id,
        "user_key": report.user_key,
        "status": report.status,
        "decision": report.decision,
        "digest": report.digest,
        "steps": report.steps,
        "tokens": report.tokens,
        "gate_reason": report.gate.reason if report.gate else None,
        "stage": report.stage,
        "error": report.error,
        **{f"rows_{split}": counts.get(split) for split in SPLITS},
        **{f"nll_{who}_{split}": nll(report, who, split) for who in WHO for split in SPLITS[1:]},
    }


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
    reports = list(_trained(facts))
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


def _rates(facts: RunFacts) -> dict[str, str]:
    """What each stage got through per second, in the unit that drives its cost."""
    amounts = {
        "partition": (facts.rows_read, "rows/s"),
        "tune": (facts.tokens_trained, "tokens/s"),
        "register": (sum(1 for _ in _trained(facts)), "users/s"),
    }
    seconds = _seconds(facts)
    return {
        stage: f"{_number(amount / seconds[stage])} {unit}"
        for stage, (amount, unit) in amounts.items()
        if amount and seconds[stage] > 0
    }


def next_steps(facts: RunFacts) -> list[tuple[str, str]]:
    """(what, command or place) of what a person does after a run."""
    steps = []
    if facts.store:
        steps.append(("answer as these users", f"ptuning serve --store {shlex.quote(facts.store)}"))
    if facts.registry_uri:
        uri = _without_password(facts.registry_uri)
        command = f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        steps.append(("models and metrics", uri if uri.startswith("http") else command))
    if facts.report_path:
        steps.append(("this report", facts.report_path))
    return steps


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _duration(seconds: float) -> str:
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
    _print_failures(console, result["failures"])
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
    table.add_row("unchanged", f"{users['unchanged']:,}", "no new rows since their last run")
    table.add_row("too few", f"{users['too_few']:,}", "too few rows, served by the base model")
    style = "red" if users["failed"] else ""
    table.add_row(Text("failed", style=style), Text(f"{users['failed']:,}", style=style), "")
    used = f"{rows['read']:,} rows read, {rows['quarantined']:,} quarantined"
    table.add_row("total", f"{users['total']:,}", used, style="bold")
    return table


def _losses(found: Shares, on_test: dict[str, float | None] | None) -> Table:
    table = _grid(("loss, nats per token (median)", "left"), ("", "right"), ("", "left"))
    table.add_row("base model", _loss(found.base), "")
    if found.other is not None:
        table.add_row("another user's prefix", _loss(found.other), "")
    table.add_row("own prefix", Text(_loss(found.own), style="bold green"), "")
    table.add_row("own beats the base", _percent(found.beat_base), "of trained users")
    if found.beat_other is not None:
        table.add_row("own beats another user's", _percent(found.beat_other), "of trained users")
    if on_test:
        before, after = _loss(on_test["base"]), _loss(on_test["candidate"])
        table.add_row("on test rows", f"{before} → {after}", "base → own")
    return table


def _stages(facts: RunFacts, result: dict[str, Any]) -> Table:
    rates = _rates(facts)
    table = _grid(("time", "left"), ("", "right"), ("", "left"))
    for stage in STAGES:
        if result["seconds"][stage] > 0:
            table.add_row(stage, _duration(result["seconds"][stage]), rates.get(stage, ""))
    trained = f"{facts.tokens_trained:,} tokens trained"
    table.add_row("total", _duration(result["seconds"]["total"]), trained, style="bold")
    return table


def _print_failures(console: Console, found: list[dict[str, str]]) -> None:
    for failure in found[:FAILURES_SHOWN]:
        head = f"failed {failure['user_key'][:12]} in {failure['stage']}: "
        console.print(Text(head, style="red") + Text(failure["error"]), soft_wrap=True)
    if len(found) > FAILURES_SHOWN:
        more = len(found) - FAILURES_SHOWN
        console.print(Text(f"and {more:,} more in summary.json and users.parquet", style="red"))
    if found:
        console.print()


# ---------------------------------------------------------------- report.html

_STYLE = """
:root { --ink: #1c2430; --soft: #5d6878; --line: #e2e6ec; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; margin: 0; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 17px; margin: 0 0 12px; font-weight: 620; }
p { margin: 0 0 8px; } .soft { color: var(--soft); }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin-top: 20px; overflow-x: auto; }
.cards { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 24px; }
.card { flex: 1 1 150px; background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px; }
.card b { display: block; font-size: 21px; white-space: nowrap; font-weight: 640; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; font-weight: 560; color: var(--soft); white-space: nowrap; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr:last-child td { border-bottom: 0; } td:first-child { white-space: nowrap; }
td.e { overflow-wrap: anywhere; }
code { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, monospace; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
"""

# The page runs nothing and fetches nothing, and says so to the browser.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def html_report(facts: RunFacts) -> str:
    """report.html: one file with its style and drawing inside; all data is escaped."""
    result = summary(facts)
    body = [
        f"<h1>Run {_escape(facts.run_id)}</h1>",
        '<p class="soft">One trained prefix per user on one frozen model. '
        "Losses are nats per completion token on validation rows.</p>",
        _cards(facts, result),
        _drawing_section(facts),
        _time_section(facts, result),
        _failures_section(result["failures"]),
        _users_section(facts),
        _next_section(facts),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ptuning run {_escape(facts.run_id)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def _cards(facts: RunFacts, result: dict[str, Any]) -> str:
    users, found = result["users"], shares(facts)
    decided = ", ".join(f"{users[decision]:,} {decision}" for decision in DECISIONS)
    rest = ", ".join(
        f"{users[status]:,} {status.replace('_', ' ')}"
        for status in STATUSES
        if status != "trained"
    )
    cards = [
        (f"{users['trained']:,} / {users['total']:,}", f"users trained ({decided}; {rest})"),
        (f"{_loss(found.base)} → {_loss(found.own)}", "median loss, base model → own prefix"),
        (_percent(found.beat_base), "of trained users beat the base model"),
        (_percent(found.beat_other), "beat another user's prefix on their own rows"),
        (_duration(result["seconds"]["total"]), f"{facts.tokens_trained:,} tokens trained"),
    ]
    if "nll_test" in result:
        test = result["nll_test"]
        value = f"{_loss(test['base'])} → {_loss(test['candidate'])}"
        cards.insert(2, (value, "the same on test rows"))
    parts = (
        f'<div class="card"><b>{_escape(a)}</b><span>{_escape(b)}</span></div>' for a, b in cards
    )
    return f'<div class="cards">{"".join(parts)}</div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_escape(title)}</h2>{content}</section>"


def _html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table from cells that are escaped here; a head that ends in `#` is of numbers."""
    classes = ["n" if name.endswith("#") else "e" for name in head]
    names = "".join(
        f'<th class="{kind}">{_escape(name.rstrip("#"))}</th>'
        for kind, name in zip(classes, head, strict=True)
    )
    lines = (
        "".join(
            f'<td class="{kind}">{_escape(cell)}</td>'
            for kind, cell in zip(classes, row, strict=True)
        )
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def _drawing_section(facts: RunFacts) -> str:
    svg = draw_losses(list(_trained(facts)))
    return _section("Loss before and after", svg or '<p class="soft">No user was trained.</p>')


def _time_section(facts: RunFacts, result: dict[str, Any]) -> str:
    rates = _rates(facts)
    rows = [
        (stage, _duration(result["seconds"][stage]), rates.get(stage, ""))
        for stage in STAGES
        if result["seconds"][stage] > 0
    ]
    rows.append(("total", _duration(result["seconds"]["total"]), ""))
    return _section("Time", _html_table(("stage", "time#", "throughput#"), rows))


def _failures_section(found: list[dict[str, str]]) -> str:
    if not found:
        return ""
    rows = [(f["user_key"][:12], f["stage"], f["error"]) for f in found[:USERS_SHOWN]]
    return _section(f"Failures ({len(found):,})", _html_table(("user key", "stage", "error"), rows))


def _users_section(facts: RunFacts) -> str:
    numbers = ("base#", "another's#", "own#", "gain#", "rows", "steps#", "tokens#")
    head = ("user key", "outcome", *numbers, "why")
    rows = [_page_row(user_id, report) for user_id, report in facts.users[:USERS_SHOWN]]
    shown = ""
    if len(facts.users) > USERS_SHOWN:
        shown = f"The first {USERS_SHOWN} of {len(facts.users):,}. "
    note = f'<p class="soft">{shown}users.parquet has every user, with ids.</p>'
    return _section("Users", note + _html_table(head, rows))


def _page_row(user_id: str, report: UserReport) -> tuple[str, ...]:
    # What is published comes from test rows where there are any.
    split = "valid" if nll(report, "candidate", "test") is None else "test"
    base, own = nll(report, "base", split), nll(report, "candidate", split)
    gain = f"{base - own:+.3f}" if base is not None and own is not None else "–"
    why = report.error or (report.gate.reason if report.gate else "")
    return (
        report.user_key[:12],
        report.decision or report.status.replace("_", " "),
        _loss(base),
        _loss(nll(report, "other", split)),
        _loss(own),
        gain,
        split if own is not None else "–",
        f"{report.steps:,}",
        f"{report.tokens:,}",
        redact(why, user_id),
    )


def _next_section(facts: RunFacts) -> str:
    rows = "".join(
        f"<p>{_escape(what)}: <code>{_escape(where)}</code></p>"
        for what, where in next_steps(facts)
        if where != facts.report_path
    )
    return _section("Where to look next", rows) if rows else ""


# ---------------------------------------------------------------- the page's drawing

_INK, _SOFT, _BASE, _OWN, _OTHER = "#1c2430", "#5d6878", "#9aa5b4", "#1f6f5c", "#c9772b"


def draw_losses(reports: Sequence[UserReport]) -> str:
    """An SVG element: base to own per user, or for many users a histogram of gains.

    "" where no user has both losses.
    """
    points = [
        (report.user_key[:8], base, own, nll(report, "other", "valid"))
        for report in reports
        if (base := nll(report, "base", "valid")) is not None
        and (own := nll(report, "candidate", "valid")) is not None
    ]
    if not points:
        return ""
    # Imported here: a run's start must not wait for matplotlib. A Figure of its own, not
    # pyplot's: no global state and no window.
    from matplotlib.figure import Figure

    many = len(points) > DUMBBELLS_SHOWN
    height = 3.6 if many else 1.3 + 0.3 * len(points)
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.add_subplot()
    if many:
        _histogram(axes, [base - own for _, base, own, _ in points])
    else:
        _dumbbells(axes, sorted(points, key=lambda point: point[2] - point[1]))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_BASE)
    axes.tick_params(colors=_SOFT, length=0)
    return _svg(figure)


def _dumbbells(axes: Any, points: list[tuple[str, float, float, float | None]]) -> None:
    rows = range(len(points), 0, -1)
    names, base, own, other = (list(column) for column in zip(*points, strict=True))
    axes.hlines(rows, base, own, color=_BASE, linewidth=2, zorder=1)
    axes.scatter(base, rows, s=46, color=_BASE, label="base model", zorder=2)
    known = [(value, row) for value, row in zip(other, rows, strict=True) if value is not None]
    if known:
        values, places = zip(*known, strict=True)
        label = "another user's prefix"
        axes.scatter(values, places, s=52, marker="|", linewidth=2.4, color=_OTHER, label=label)
    axes.scatter(own, rows, s=58, color=_OWN, label="own prefix", zorder=3)
    axes.set_yticks(list(rows), names, family="monospace")
    axes.set_ylim(0.3, len(points) + 0.7)
    axes.grid(axis="x", color="#e2e6ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("nats per completion token (less is better)", color=_SOFT)
    axes.figure.legend(loc="outside upper left", ncols=3, frameon=False, labelcolor=_INK)


def _histogram(axes: Any, gains: list[float]) -> None:
    # Bins are counted from zero, so that none holds both losers and winners.
    low, high = min(*gains, 0.0), max(*gains, 0.0)
    width = (high - low) / min(60, max(12, len(gains) // 20)) or 1e-3
    first, last = math.floor(low / width), math.ceil(high / width) + 1
    edges = [width * step for step in range(first, last + 1)]
    _, _, bars = axes.hist(gains, bins=edges, color=_OWN, rwidth=0.9)
    for bar in bars:
        if bar.get_x() + bar.get_width() / 2 < 0:
            bar.set_facecolor(_OTHER)
    axes.axvline(0, color=_INK, linewidth=1)
    axes.grid(axis="y", color="#e2e6ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("gain over the base model, nats per completion token", color=_SOFT)
    axes.set_ylabel("users", color=_SOFT)


def _svg(figure: Any) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    # Fixed salt and no date: the same run gives the same page, byte for byte.
    with matplotlib.rc_context({"svg.hashsalt": "ptuning", "svg.fonttype": "path"}):
        canvas = FigureCanvasSVG(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.print_svg(buffer, metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


# ---------------------------------------------------------------- while it runs


class RunProgress:
    """Users done, tokens per second and time left, of one stage after another.

    On a terminal a live bar; elsewhere (a log, a pipe) plain lines, at most one every
    `interval_s` seconds, and one at the end of each stage.

        with RunProgress(console) as progress:
            progress.stage("tune", total=600)
            progress.update(done=12, tokens=48_000)
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console()
        self.interval_s = interval_s
        self._clock = clock
        self._name = ""
        self._unit = "users"
        self._total: int | None = None
        self._done = self._tokens = 0
        self._began = self._printed = 0.0
        self._task: TaskID | None = None
        self._bar = self._make_bar() if self.console.is_terminal else None

    def __enter__(self) -> RunProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_stage()
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str, total: int | None = None, *, unit: str = "users") -> None:
        """Begin a stage of `total` units (None where the number is not known)."""
        self._end_stage()
        self._name, self._total, self._unit = name, total, unit
        self._done = self._tokens = 0
        self._began = self._printed = self._clock()
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total, unit=unit, rate="")

    def update(self, done: int, tokens: int = 0) -> None:
        """Both count from the stage's beginning, so saying the same twice does no harm."""
        self._done, self._tokens = done, tokens
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, rate=self._rate())
        elif self._clock() - self._printed >= self.interval_s:
            self._printed = self._clock()
            self._print_line(left=True)

    def _end_stage(self) -> None:
        if self._name and self._bar is None:
            self._print_line(left=False)
        self._name, self._task = "", None

    def _elapsed(self) -> float:
        return self._clock() - self._began

    def _rate(self) -> str:
        elapsed = self._elapsed()
        return f"{_number(self._tokens / elapsed)} tokens/s" if self._tokens and elapsed > 0 else ""

    def _print_line(self, *, left: bool) -> None:
        of = f" of {self._total:,}" if self._total is not None else ""
        parts = [f"{self._name}: {self._done:,}{of} {self._unit}"]
        if rate := self._rate():
            parts.append(rate)
        if left and self._total and self._done:
            remaining = self._elapsed() * (self._total - self._done) / self._done
            parts.append(f"{_duration(max(0.0, remaining))} left")
        elif not left:
            parts.append(_duration(self._elapsed()))
        self.console.print(Text(", ".join(parts)), soft_wrap=True)

    def _make_bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", markup=False),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
        )
