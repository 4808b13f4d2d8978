"""The placement of virtual tokens among a row's real tokens, as text such as
`{p:3}{prompt}{p:3} So: {completion}`.

Virtual token k has the id -1-k, so a row with virtual tokens is still a single list of ids for all
code that cuts, pads or counts rows.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ptuning.data.encode import IGNORE, Encoded, Template
from ptuning.errors import MethodError

_FIELD = re.compile(r"\{([^{}]*)\}")
_SYNTAX = "text with {p:N} (N virtual tokens, N > 0), {prompt} once and {completion} at the end"


@dataclass(frozen=True)
class Arrangement:
    """The ids before and after a prompt, for one tokenizer. Negative ids are virtual tokens."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def anchors(self) -> int:
        """The number of real tokens before and after the prompt."""
        return sum(token >= 0 for token in (*self.before, *self.after))

    @property
    def in_front(self) -> int:
        """P if all virtual tokens come before every real token, otherwise 0."""
        virtual = sum(token < 0 for token in (*self.before, *self.after))
        leading = sum(1 for _ in itertools.takewhile(lambda token: token < 0, self.before))
        return virtual if leading == virtual else 0

    def without_front(self) -> Arrangement:
        """The arrangement without its leading virtual tokens, once they are keys and values."""
        return Arrangement(self.before[self.in_front :], self.after)

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """The prompt's ids with the arrangement's before and after them."""
        return [*self.before, *ids, *self.after]

    def row(self, row: Encoded) -> Encoded:
        """An encoded row with the arrangement's ids around its prompt, unsupervised."""
        at = row.prompt_length
        ids = self.prompt(row.input_ids[:at])
        return Encoded([*ids, *row.input_ids[at:]], [IGNORE] * len(ids) + row.labels[at:])

    def judged_row(self, row: Encoded) -> Encoded:
        """As `row`, but only with labels that the base model can predict too.

        In a row without a prompt only virtual tokens precede the first token, so the base model
        cannot predict it; it is left out of every comparison.
        """
        arranged = self.row(row)
        if row.prompt_length == 0 and row.labels:
            arranged.labels[len(self.before) + len(self.after)] = IGNORE
        return arranged


@dataclass(frozen=True)
class Layout:
    """A parsed placement: what comes before and after the prompt, as counts of virtual tokens and
    pieces of text."""

    text: str
    before: tuple[int | str, ...]
    after: tuple[int | str, ...]

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Parse a placement such as `method.template`. Raises MethodError."""
        parts = _parts(text)
        if parts.count("{prompt}") != 1:
            raise _wrong(text, f"{{prompt}} {parts.count('{prompt}')} times")
        if "{completion}" in parts:
            if parts.index("{completion}") != len(parts) - 1:
                raise _wrong(text, "something after {completion}, or {completion} twice")
            parts.pop()
        at = parts.index("{prompt}")
        layout = cls(text, tuple(parts[:at]), tuple(parts[at + 1 :]))
        if not layout.num_virtual_tokens:
            raise _wrong(text, "no virtual tokens")
        return layout

    @property
    def num_virtual_tokens(self) -> int:
        return sum(part for part in (*self.before, *self.after) if isinstance(part, int))

    def bind(self, template: Template) -> Arrangement:
        """Tokenise the layout; each piece of text is tokenised separately."""
        count, sides = 0, []
        for side in (self.before, self.after):
            ids: list[int] = []
            for part in side:
                if isinstance(part, int):
                    ids += [-1 - k for k in range(count, count + part)]
                    count += part
                else:
                    ids += template.ids(part)
            sides.append(tuple(ids))
        return Arrangement(*sides)


def front(num_virtual_tokens: int) -> Layout:
    """P virtual tokens before everything else."""
    return Layout.parse(f"{{p:{num_virtual_tokens}}}{{prompt}}{{completion}}")


def between(num_virtual_tokens: int) -> Layout:
    """P virtual tokens between the prompt and the completion (infix)."""
    return Layout.parse(f"{{prompt}}{{p:{num_virtual_tokens}}}{{completion}}")


def _parts(text: str) -> list[int | str]:
    parts: list[int | str] = []
    at = 0
    for match in _FIELD.finditer(text):
        if match.start() > at:
            parts.append(text[at : match.start()])
        field, at = match.group(1), match.end()
        if field in ("prompt", "completion"):
            parts.append(f"{{{field}}}")
        elif re.fullmatch(r"p:[1-9][0-9]{0,8}", field):
            parts.append(int(field[2:]))
        else:
            raise _wrong(text, f"{{{field}}}")
    if at < len(text):
        parts.append(text[at:])
    if any("{" in part or "}" in part for part in _FIELD.split(text)[::2]):
        raise _wrong(text, "a brace alone")
    return parts


def _wrong(text: str, seen: str) -> MethodError:
    return MethodError(
        "method.template cannot be used",
        seen=f"{seen} in {text!r}",
        expected=_SYNTAX,
        fix="set method.template, for instance '{p:3}{prompt}{p:3}{completion}'",
    )
