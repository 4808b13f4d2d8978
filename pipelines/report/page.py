"""report.html: a run's report as a single static page, without scripts or external resources.

It has user keys, never user ids; everything that comes from data is escaped.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from pipelines.report.summary import (
    DECISIONS,
    STAGES,
    STATUSES,
    RunFacts,
    duration_text,
    loss_text,
    make_summary,
    next_steps,
    nll,
    notice_lines,
    percent_text,
    reason_of,
    shares,
    stage_rates,
    trained_users,
)
from ptuning.system.redaction import hide_user
from ptuning.types import UserReport

USERS_SHOWN = 200  # on the page
DUMBBELLS_SHOWN = 40  # with more users, the page draws a histogram of gains
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

# Tells the browser not to run or load anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def html_report(facts: RunFacts) -> str:
    """The page as one file, with its style and drawing; all data is escaped."""
    result = make_summary(facts)
    body = [
        f"<h1>Run {_escape(facts.run_id)}</h1>",
        '<p class="soft">One trained prefix per user on one frozen model. '
        "Losses are nats per completion token on validation rows.</p>",
        _cards(facts, result),
        _drawing_section(facts),
        _time_section(facts, result),
        _failures_section(result),
        _notices_section(facts),
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
        (
            f"{loss_text(found.base)} → {loss_text(found.candidate)}",
            "median loss, base model → own prefix",
        ),
        (percent_text(found.beat_base), "of trained users beat the base model"),
        (percent_text(found.beat_other), "beat another user's prefix on their own rows"),
        (duration_text(result["seconds"]["total"]), f"{facts.tokens_trained:,} tokens trained"),
    ]
    if "nll_test" in result:
        test = result["nll_test"]
        value = f"{loss_text(test['base'])} → {loss_text(test['candidate'])}"
        cards.insert(2, (value, "the same on test rows"))
    parts = (
        f'<div class="card"><b>{_escape(a)}</b><span>{_escape(b)}</span></div>' for a, b in cards
    )
    return f'<div class="cards">{"".join(parts)}</div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_escape(title)}</h2>{content}</section>"


def _html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are escaped here. A heading that ends in `#` marks a column of numbers."""
    classes = ["n" if name.endswith("#") else "e" for name in head]
    names = "".join(
        f'<th class="{css_class}">{_escape(name.rstrip("#"))}</th>'
        for css_class, name in zip(classes, head, strict=True)
    )
    lines = (
        "".join(
            f'<td class="{css_class}">{_escape(cell)}</td>'
            for css_class, cell in zip(classes, row, strict=True)
        )
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def _drawing_section(facts: RunFacts) -> str:
    svg = draw_losses(list(trained_users(facts)))
    return _section("Loss before and after", svg or '<p class="soft">No user was trained.</p>')


def _time_section(facts: RunFacts, result: dict[str, Any]) -> str:
    rates = stage_rates(facts)
    rows = [
        (stage, duration_text(result["seconds"][stage]), rates.get(stage, ""))
        for stage in STAGES
        if result["seconds"][stage] > 0
    ]
    rows.append(("total", duration_text(result["seconds"]["total"]), ""))
    return _section("Time", _html_table(("stage", "time#", "throughput#"), rows))


def _failures_section(result: dict[str, Any]) -> str:
    found = result["failures"]
    if not found:
        return ""
    rows = [(f["user_key"][:12], f["stage"], f["error"]) for f in found]
    title = f"Failures ({result['users']['failed']:,})"
    return _section(title, _html_table(("user key", "stage", "error"), rows))


def _notices_section(facts: RunFacts) -> str:
    lines = "".join(f"<p>{_escape(line)}</p>" for line in notice_lines(facts))
    return _section("Worth knowing", lines) if lines else ""


def _users_section(facts: RunFacts) -> str:
    numbers = ("base#", "another's#", "own#", "gain#", "rows", "steps#", "tokens#")
    head = ("user key", "outcome", *numbers, "why")
    rows = [_page_row(user_id, report) for user_id, report in facts.users[:USERS_SHOWN]]
    shown = ""
    if len(facts.users) > USERS_SHOWN:
        shown = f"The first {USERS_SHOWN} of {len(facts.users):,}. "
    note = f'<p class="soft">{shown}The table in users/ has every user, with ids.</p>'
    return _section("Users", note + _html_table(head, rows))


def _page_row(user_id: str | None, report: UserReport) -> tuple[str, ...]:
    # Numbers for publication should come from test rows, if there are any.
    split = "valid" if nll(report, "candidate", "test") is None else "test"
    base, candidate = nll(report, "base", split), nll(report, "candidate", split)
    gain = f"{base - candidate:+.3f}" if base is not None and candidate is not None else "–"
    return (
        report.user_key[:12],
        report.decision or report.status.replace("_", " "),
        loss_text(base),
        loss_text(nll(report, "other", split)),
        loss_text(candidate),
        gain,
        split if candidate is not None else "–",
        f"{report.steps:,}",
        f"{report.tokens:,}",
        hide_user(reason_of(report) or "", user_id or ""),
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
    """An SVG element: base and candidate loss per user, or for many users a histogram of gains.

    "" if no user has both losses.
    """
    points = [
        (report.user_key[:8], base, candidate, nll(report, "other", "valid"))
        for report in reports
        if (base := nll(report, "base", "valid")) is not None
        and (candidate := nll(report, "candidate", "valid")) is not None
    ]
    if not points:
        return ""
    # Imported here so that the start of a run need not wait for matplotlib. Not pyplot, which has
    # global state and may open a window.
    from matplotlib.figure import Figure

    many = len(points) > DUMBBELLS_SHOWN
    height = 3.6 if many else 1.3 + 0.3 * len(points)
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.add_subplot()
    if many:
        _histogram(axes, [base - candidate for _, base, candidate, _ in points])
    else:
        _dumbbells(axes, sorted(points, key=lambda point: point[2] - point[1]))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_BASE)
    axes.tick_params(colors=_SOFT, length=0)
    return _svg(figure)


def _dumbbells(axes: Any, points: list[tuple[str, float, float, float | None]]) -> None:
    rows = range(len(points), 0, -1)
    names, base, candidate, other = (list(column) for column in zip(*points, strict=True))
    axes.hlines(rows, base, candidate, color=_BASE, linewidth=2, zorder=1)
    axes.scatter(base, rows, s=46, color=_BASE, label="base model", zorder=2)
    known = [(value, row) for value, row in zip(other, rows, strict=True) if value is not None]
    if known:
        values, places = zip(*known, strict=True)
        label = "another user's prefix"
        axes.scatter(values, places, s=52, marker="|", linewidth=2.4, color=_OTHER, label=label)
    axes.scatter(candidate, rows, s=58, color=_OWN, label="own prefix", zorder=3)
    axes.set_yticks(list(rows), names, family="monospace")
    axes.set_ylim(0.3, len(points) + 0.7)
    axes.grid(axis="x", color="#e2e6ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("nats per completion token (less is better)", color=_SOFT)
    axes.figure.legend(loc="outside upper left", ncols=3, frameon=False, labelcolor=_INK)


def _histogram(axes: Any, gains: list[float]) -> None:
    # One bin edge is at zero, so that no bin mixes losses and gains.
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
    # With a fixed salt and no date, the same run gives the same page, byte for byte.
    with matplotlib.rc_context({"svg.hashsalt": "ptuning", "svg.fonttype": "path"}):
        canvas = FigureCanvasSVG(figure)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.print_svg(buffer, metadata=no_metadata)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
