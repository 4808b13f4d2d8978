"""Notices about the data: typed, counted, and few enough to print.

There is a notice for every file, column or user that is skipped, ignored or lost entirely, and for
every interpretation that might be unexpected. A run's terminal output and report show the texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal[
    "unread_file",
    "copied_file",
    "lost_file",
    "lost_user",
    "unknown_column",
    "weight_zero",
    "tool_call",
    "header_again",
    "number_id",
    "split_name",
    "epoch_unit",
    "alpaca",
]
KINDS: tuple[Kind, ...] = get_args(Kind)  # in display order
MOST_SUBJECTS = 20  # of one kind; one more notice counts the others

_TEXTS: dict[Kind, str] = {
    "unread_file": "{subject} was not read: its name has none of the known endings",
    "copied_file": "{subject} has the same contents as another file and was counted once",
    "lost_file": "{subject} was not used: all of its rows ({count}) are quarantined",
    "lost_user": "user {subject} (user key) has no rows left: all ({count}) are quarantined",
    "unknown_column": "column {subject!r} was not read ({count} rows have it)",
    "weight_zero": "{count} rows of weight 0 were not used",
    "tool_call": "{count} turns that only call a tool were kept without text",
    "header_again": "{subject} repeats its header {count} times; those lines were skipped",
    "number_id": "user ids of type {subject} were taken as their decimal text ({count} rows)",
    "split_name": "split {subject} ({count} rows)",
    "epoch_unit": "timestamps were read as epoch {subject} ({count} rows)",
    "alpaca": "instruction and input were read as the prompt ({count} rows)",
}
_OTHERS: dict[Kind, str] = {
    "unread_file": "{more} more files were not read",
    "copied_file": "{more} more files are copies and were counted once",
    "lost_file": "{more} more files were not used ({count} rows)",
    "lost_user": "{more} more users have no rows left ({count} rows)",
}


@dataclass(frozen=True, kw_only=True)
class Notice:
    """One notice. `subject` is a file, column, user key or name, or "" if the notice sums up the
    rest of its kind; `count` counts rows (for `unread_file` and `copied_file`, files)."""

    kind: Kind
    subject: str
    count: int
    text: str


@dataclass(frozen=True, kw_only=True)
class BadFile:
    """The number of quarantined rows in a file, and the most frequent reasons with counts."""

    file: str
    rows: int
    reasons: tuple[tuple[str, int], ...]


def make_notices(counts: Mapping[tuple[str, str], int]) -> tuple[Notice, ...]:
    """Notices from (kind, subject) -> count, ordered by kind and count, at most 21 of a kind."""
    notices: list[Notice] = []
    for kind in KINDS:
        items = [(subject, count) for (name, subject), count in counts.items() if name == kind]
        items.sort(key=lambda item: (-item[1], item[0]))
        notices += [_notice(kind, *item) for item in items[:MOST_SUBJECTS]]
        if rest := items[MOST_SUBJECTS:]:
            count = sum(count for _, count in rest)
            text = _OTHERS.get(kind, "{more} more of the same kind ({count} rows)")
            text = text.format(more=len(rest), count=count)
            notices.append(Notice(kind=kind, subject="", count=count, text=text))
    return tuple(notices)


def _notice(kind: Kind, subject: str, count: int) -> Notice:
    subject = subject.encode("utf-8", "backslashreplace").decode("utf-8")  # a file's name
    text = _TEXTS[kind].format(subject=subject, count=count)
    return Notice(kind=kind, subject=subject, count=count, text=text)


def bad_files(
    counts: Mapping[tuple[str, str], int], most: int = MOST_SUBJECTS
) -> tuple[BadFile, ...]:
    """The files with the most quarantined rows, given (file, reason) -> rows."""
    files: dict[str, Counter[str]] = {}
    for (file, reason), rows in counts.items():
        files.setdefault(file, Counter())[reason] += rows
    order = sorted(files, key=lambda file: (-files[file].total(), file))[:most]
    return tuple(
        BadFile(file=file, rows=files[file].total(), reasons=tuple(files[file].most_common(3)))
        for file in order
    )


def notices_from(values: Iterable[Mapping[str, Any]]) -> tuple[Notice, ...]:
    """The inverse of `dataclasses.asdict` after JSON."""
    return tuple(Notice(**value) for value in values)


def bad_files_from(values: Iterable[Mapping[str, Any]]) -> tuple[BadFile, ...]:
    return tuple(
        BadFile(
            file=value["file"],
            rows=value["rows"],
            reasons=tuple((reason, count) for reason, count in value["reasons"]),
        )
        for value in values
    )
