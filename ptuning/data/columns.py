"""Which column of an input is which field of a row: the one place, for every format.

A new name for a field is one line of ALIASES; Parquet, JSONL, CSV and folders named
`split=test` all follow. Names are compared without case, blanks, `_` and `-`; an exact name
goes before a similar one, and either before an alias.

Raise ROW_RULES with every change of what a raw row means (here, or in `values`, `times`,
`messages`, `examples.check_row`): it is part of a partition's id, so that rows read by older
rules are read again. A test compares the rules with golden values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from ptuning.errors import DataError
from ptuning.types import Config

ROW_RULES = 2

FIELDS = (
    "user_id",
    "prompt",
    "completion",
    "messages",
    "timestamp",
    "split",
    "weight",
    "init_words",
)
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("instruction",),  # Alpaca
    "completion": ("output",),
    "messages": ("conversations",),  # ShareGPT
}
INPUT = "input"  # Alpaca's second half of a prompt, read where `instruction` is the prompt

_SEPARATORS = re.compile(r"[\s_\-\ufeff]+")
_MOST_LAYOUTS = 256  # JSONL rows may each have other keys


class ColumnNames(Config):
    """Names of the input's columns, where they are not those of the fields."""

    SECTION: ClassVar[str] = "data.columns"

    user_id: str | None = Field(None, description="input column that names the user")
    prompt: str | None = Field(None, description="input column of the prompt")
    completion: str | None = Field(None, description="input column of the completion")
    messages: str | None = Field(None, description="input column of the conversation")
    timestamp: str | None = Field(None, description="input column of the row's time")
    split: str | None = Field(None, description="input column of the row's split")
    weight: str | None = Field(None, description="input column of the row's weight, 0 or 1")
    init_words: str | None = Field(None, description="input column of the user's first words")


@dataclass(slots=True, eq=False)
class Layout:
    """Where the fields stand in rows with certain columns. `uses` counts such rows."""

    sources: dict[str, str]  # field -> column
    input: str | None  # the column to append to the prompt
    unknown: tuple[str, ...]
    uses: int = 0

    @property
    def columns(self) -> list[str]:
        """The columns to read."""
        return [*self.sources.values(), *([self.input] if self.input is not None else [])]


class Columns:
    """Finds the fields among an input's columns; remembers what it found, and what it did not."""

    def __init__(self, names: ColumnNames | None = None) -> None:
        chosen = (names or ColumnNames()).model_dump()
        self._chosen = {field: name for field, name in chosen.items() if name}
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._unknown: Counter[str] = Counter()

    def layout(self, names: tuple[str, ...]) -> Layout:
        """The layout of rows with these columns. DataError where a field stands there twice."""
        found = self._layouts.get(names)
        if found is None:
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._count_unknown()
                self._layouts.clear()
            found = self._layouts[names] = self._find(names)
        return found

    def unknown(self) -> Counter[str]:
        """Rows by column that was not read, since the last call."""
        self._count_unknown()
        counts, self._unknown = self._unknown, Counter()
        return counts

    def _count_unknown(self) -> None:
        for layout in self._layouts.values():
            for name in layout.unknown if layout.uses else ():
                self._unknown[name] += layout.uses
            layout.uses = 0

    def _find(self, names: tuple[str, ...]) -> Layout:
        similar: dict[str, list[str]] = {}
        for name in names:
            similar.setdefault(_fold(name), []).append(name)
        sources: dict[str, str] = {}
        for field in FIELDS:
            source = _pick(self._chosen.get(field, field), names, similar)
            if source is not None:
                sources[field] = source
        for field, aliases in ALIASES.items():
            if field in sources or field in self._chosen or _clashes(field, sources):
                continue
            found = (_pick(alias, names, similar) for alias in aliases)
            source = next((name for name in found if name not in (None, *sources.values())), None)
            if source is not None:
                sources[field] = source
        more = None
        if _fold(sources.get("prompt", "")) in ALIASES["prompt"] and "prompt" not in self._chosen:
            more = _pick(INPUT, names, similar)
        used = {*sources.values(), more}
        return Layout(sources, more, tuple(dict.fromkeys(n for n in names if n not in used)))


def _fold(name: str) -> str:
    return _SEPARATORS.sub("", name).lower()


def _pick(wanted: str, names: Sequence[str], similar: Mapping[str, list[str]]) -> str | None:
    found = [name for name in names if name == wanted] or similar.get(_fold(wanted), [])
    if len(found) > 1:
        raise DataError("a column stands twice in an input file", seen=", ".join(found))
    return found[0] if found else None


def _clashes(field: str, sources: Mapping[str, str]) -> bool:
    """Whether the field is of the other of a row's two shapes than the one that was found."""
    if field == "messages":
        return "prompt" in sources or "completion" in sources
    return field in ("prompt", "completion") and "messages" in sources
