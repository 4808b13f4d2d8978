"""Map input columns to fields of a row, for every format.

To add a name for a field, add a line to COLUMN_ALIASES; it applies to Parquet, JSONL, CSV and
folders named `split=test`. Names are compared without case, blanks, `_` and `-`. An exact name
takes precedence over a similar one, and both over an alias.

Raise ROW_RULES whenever the meaning of a raw row changes (here, or in `values`, `times`,
`messages`, `examples.check_row`): it is part of a partition's id, so rows are read again under the
new rules. A test compares the rules with golden values.
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

ROW_RULES = 3

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
# Alpaca's two parts of a prompt; the second is read only if the first is the prompt.
INSTRUCTION, INPUT = "instruction", "input"
COLUMN_ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": (INSTRUCTION,),
    "completion": ("output",),
    "messages": ("conversations",),  # ShareGPT
}

_SEPARATORS = re.compile(r"[\s_\-\ufeff]+")
_MOST_LAYOUTS = 256  # every JSONL row may have different keys


class ColumnNames(Config):
    """Names of input columns, if they differ from those of the fields."""

    SECTION: ClassVar[str] = "data.columns"

    user_id: str | None = Field(None, description="input column that names the user")
    prompt: str | None = Field(None, description="input column of the prompt")
    completion: str | None = Field(None, description="input column of the completion")
    messages: str | None = Field(None, description="input column of the conversation")
    timestamp: str | None = Field(None, description="input column of the row's time")
    split: str | None = Field(None, description="input column of the row's split")
    weight: str | None = Field(None, description="input column of the row's weight, 0 or 1")
    init_words: str | None = Field(None, description="input column of the user's init words")


@dataclass(slots=True, eq=False)
class Layout:
    """The columns of the fields, for rows with one set of columns. `uses` counts such rows."""

    sources: dict[str, str]  # field -> column
    input: str | None  # the column to append to the prompt
    unknown: tuple[str, ...]
    uses: int = 0

    @property
    def columns(self) -> list[str]:
        """The columns to read."""
        return [*self.sources.values(), *([self.input] if self.input is not None else [])]


class Columns:
    """Finds the fields among an input's columns, with a cache, and counts unknown columns."""

    def __init__(self, names: ColumnNames | None = None) -> None:
        chosen = (names or ColumnNames()).model_dump()
        self._chosen = {field: name for field, name in chosen.items() if name}
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._unknown: Counter[str] = Counter()

    def layout(self, names: tuple[str, ...]) -> Layout:
        """The layout of rows with these columns. Raises DataError if a field occurs twice."""
        found = self._layouts.get(names)
        if found is None:
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._count_unknown()
                self._layouts.clear()
            found = self._layouts[names] = self._find(names)
        return found

    def unknown(self) -> Counter[str]:
        """How many rows had each unknown column, since the last call."""
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
        sources |= self._find_aliases(names, similar, sources)
        more = None
        if _fold(sources.get("prompt", "")) == INSTRUCTION and "prompt" not in self._chosen:
            more = _pick(INPUT, names, similar)
        used = {*sources.values(), more}
        return Layout(sources, more, tuple(dict.fromkeys(n for n in names if n not in used)))

    def _find_aliases(
        self, names: Sequence[str], similar: Mapping[str, list[str]], sources: Mapping[str, str]
    ) -> dict[str, str]:
        """The columns of the fields that occur only under an alias.

        A row has one of two shapes. Columns by their own names decide which, then a prompt with a
        completion; beside a conversation, a lone `instruction` or `output` is something else.
        """
        found: dict[str, str] = {}
        for field, aliases in COLUMN_ALIASES.items():
            if field in sources or field in self._chosen:
                continue
            columns = (_pick(alias, names, similar) for alias in aliases)
            taken = {*sources.values(), None}
            column = next((column for column in columns if column not in taken), None)
            if column is not None:
                found[field] = column
        pair = {"prompt", "completion"}
        is_pair = pair <= {*sources, *found} or not pair.isdisjoint(sources)
        if "messages" in sources or ("messages" in found and not is_pair):
            return {field: column for field, column in found.items() if field not in pair}
        return {field: column for field, column in found.items() if field != "messages"}


def _fold(name: str) -> str:
    return _SEPARATORS.sub("", name).lower()


def _pick(wanted: str, names: Sequence[str], similar: Mapping[str, list[str]]) -> str | None:
    found = [name for name in names if name == wanted] or similar.get(_fold(wanted), [])
    if len(found) > 1:
        raise DataError("a column occurs twice in an input file", seen=", ".join(found))
    return found[0] if found else None
