"""The demo's picture: each user's losses, and the answers of the base model and of users.

On the left, the loss on each user's validation rows: of the base model, with another user's prefix
and with the user's own. On the right, the answers to the same questions. Answers are text from a
model: they are measured before they are wrapped and cut, and never parsed as mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch
from matplotlib.textpath import TextToPath

WIDTH_PX, HEIGHT_PX, DPI = 1600, 1000, 100
INK, SOFT, LINE, PAPER = "#1c2430", "#5d6878", "#e2e6ec", "#ffffff"
BASE, OTHER, OWN = "#9aa5b4", "#c9772b", "#1f6f5c"
LINE_SPACING = 1.38  # of the font size, between baselines


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """One user's validation losses in nats per completion token; None if not measured."""

    user: str
    base: float
    own: float
    other: float | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of `who` ("base" or a user) to `question`."""

    question: str
    who: str
    text: str


def draw(rows: Sequence[LossRow], answers: Sequence[Answer], out: Path) -> Path:
    """Write the PNG, 1600 x 1000 pixels. Shows at most two questions and four answers to each."""
    figure = Figure(figsize=(WIDTH_PX / DPI, HEIGHT_PX / DPI), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    _draw_losses(figure.add_axes((0.085, 0.085, 0.265, 0.715)), rows)
    _draw_answers(figure.add_axes((0.385, 0.03, 0.597, 0.86)), answers)
    title = "One frozen model, one small trained prefix per user"
    _draw_text(figure, 0.018, 0.955, title, size=21, weight="bold", color=INK)
    _draw_text(figure, 0.018, 0.9, _summarise(rows), size=12.5, color=SOFT)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=DPI)
    return out


def _summarise(rows: Sequence[LossRow]) -> str:
    """One sentence with the shares of users for whom the own prefix is better."""
    if not rows:
        return "No user was trained."
    base = sum(row.own < row.base for row in rows)
    compared = [row for row in rows if row.other is not None]
    sentence = f"The own prefix is better than the base model for {base} of {len(rows)} users"
    if compared:
        other = sum(row.own < row.other for row in compared if row.other is not None)
        sentence += f", better than another user's for {other} of {len(compared)}"
    return sentence + "."


# ---------------------------------------------------------------- losses


def _draw_losses(axes: Axes, rows: Sequence[LossRow]) -> None:
    ordered = sorted(rows, key=lambda row: row.own - row.base)
    places = list(range(len(ordered), 0, -1))
    for place, row in zip(places, ordered, strict=True):
        _draw_user(axes, place, row)
    axes.set_yticks(places, [_shorten(row.user) for row in ordered], fontsize=13, color=INK)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.set_ylim(0.35, max(1, len(ordered)) + 0.65)
    axes.margins(x=0.13)
    axes.set_xlabel("validation loss, nats per token (lower is better)", fontsize=11.5, color=SOFT)
    axes.grid(axis="x", color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(BASE)
    axes.tick_params(axis="x", colors=SOFT, length=0, labelsize=11, pad=6)
    axes.tick_params(axis="y", length=0, pad=8)
    _draw_legend(axes, with_other=any(row.other is not None for row in ordered))


def _draw_user(axes: Axes, place: int, row: LossRow) -> None:
    axes.plot([row.base, row.own], [place, place], color=LINE, linewidth=7, zorder=1)
    axes.plot(row.base, place, "o", color=BASE, markersize=11, zorder=2)
    if row.other is not None:
        axes.plot(row.other, place, "D", color=OTHER, markersize=8, zorder=3)
    axes.plot(row.own, place, "o", color=OWN, markersize=13, zorder=4)
    # Below the dot: the user's other dots are on its line.
    axes.annotate(
        f"{row.own:.2f}",
        (row.own, place),
        xytext=(0, -21),
        textcoords="offset points",
        ha="center",
        fontsize=11,
        color=OWN,
        weight="bold",
    )


def _draw_legend(axes: Axes, *, with_other: bool) -> None:
    marks = [("o", BASE, 9, "base model"), ("o", OWN, 11, "own prefix")]
    if with_other:
        marks.insert(1, ("D", OTHER, 7, "another user's prefix"))
    for shape, color, size, label in marks:
        axes.plot([], [], shape, color=color, markersize=size, label=label)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.31, 1.005),
        ncols=len(marks),
        frameon=False,
        fontsize=11.5,
        labelcolor=INK,
        handletextpad=0.1,
        columnspacing=1.1,
    )


# ---------------------------------------------------------------- answers


def _draw_answers(axes: Axes, answers: Sequence[Answer]) -> None:
    """Draw a grid of cells: one column per question, one row per answerer. Units are pixels."""
    box = axes.get_window_extent()
    axes.set(xlim=(0, box.width), ylim=(box.height, 0))
    axes.axis("off")
    questions = list(dict.fromkeys(answer.question for answer in answers))[:2]
    people = list(dict.fromkeys(answer.who for answer in answers))
    people = sorted(people, key=lambda who: who != "base")[:4]
    if not questions:
        return
    said = {(answer.question, answer.who): answer.text for answer in answers}
    gap, head = 14.0, 92.0
    width = (box.width - gap * (len(questions) - 1)) / len(questions)
    height = (box.height - head - gap * (len(people) - 1)) / len(people)
    for column, question in enumerate(questions):
        left = column * (width + gap)
        _draw_cell_text(axes, question, left + 4, 8, width - 8, head - 16, size=13.5, color=INK)
        for row, who in enumerate(people):
            top = head + row * (height + gap)
            _draw_cell(axes, who, said.get((question, who)), (left, top, width, height))


def _draw_cell(
    axes: Axes, who: str, text: str | None, place: tuple[float, float, float, float]
) -> None:
    left, top, width, height = place
    color = SOFT if who == "base" else OWN
    face = "#f4f5f7" if who == "base" else "#eef6f3"
    style = "round,pad=0,rounding_size=9"
    patch = FancyBboxPatch((left, top), width, height, boxstyle=style, facecolor=face, linewidth=0)
    axes.add_patch(patch)
    name = "base model" if who == "base" else _shorten(who)
    _draw_text(axes, left + 16, top + 25, name, size=12, weight="bold", color=color)
    shown = text.strip() if text and text.strip() else "(no answer)"
    _draw_cell_text(axes, shown, left + 16, top + 44, width - 32, height - 56, size=12.5, color=INK)


def _draw_cell_text(
    axes: Axes,
    text: str,
    left: float,
    top: float,
    width: float,
    height: float,
    *,
    size: float,
    color: str,
) -> None:
    step = size * DPI / 72 * LINE_SPACING
    lines = fit(text, width_px=width, lines=max(1, int(height // step)), size=size)
    for number, line in enumerate(lines):
        _draw_text(axes, left, top + (number + 0.72) * step, line, size=size, color=color)


def _draw_text(target: Any, x: float, y: float, text: str, *, size: float, **style: Any) -> None:
    # Without parse_math: a `$` in an answer is a dollar sign.
    target.text(x, y, text, fontsize=size, va="baseline", parse_math=False, **style)


def _shorten(name: str, limit: int = 16) -> str:
    name = " ".join(name.split())
    return name if len(name) <= limit else name[: limit - 1] + "…"


def fit(text: str, *, width_px: float, lines: int, size: float) -> list[str]:
    """Wrap a text into at most `lines` lines of at most `width_px`; "…" marks a cut."""
    wrapped: list[str] = []
    for paragraph in text.splitlines():
        if paragraph.strip():
            wrapped += _wrap(paragraph.split(), width_px, size)
    if len(wrapped) <= lines:
        return wrapped
    last = wrapped[lines - 1]
    while _measure_px(last + " …", size) > width_px and " " in last:
        last = last.rpartition(" ")[0]
    return [*wrapped[: lines - 1], last.rstrip(" ,;:") + " …"]


def _wrap(words: list[str], width_px: float, size: float) -> list[str]:
    done: list[str] = []
    line = ""
    for word in words:
        longer = f"{line} {word}".strip()
        if _measure_px(longer, size) <= width_px:
            line = longer
            continue
        if line:
            done.append(line)
        # A word wider than the cell is split: a model may repeat one letter for ever.
        while _measure_px(word, size) > width_px and len(word) > 1:
            part = max(1, int(len(word) * width_px / _measure_px(word, size)))
            done.append(word[:part])
            word = word[part:]
        line = word
    return [*done, line] if line else done


def _measure_px(text: str, size: float) -> float:
    return sum(_measure_character_px(character, size) for character in text)


_MEASURE = TextToPath()


@cache
def _measure_character_px(character: str, size: float) -> float:
    # Cached by character, so that long answers are cheap to measure. This ignores kerning, which
    # is less than one pixel per line.
    font = FontProperties(size=size)
    width, _, _ = _MEASURE.get_text_width_height_descent(character, font, ismath=False)
    return float(width) * DPI / 72
