"""Where virtual tokens stand among a row's real ones: `{p:3}{prompt}{p:3} So: {completion}`.

Virtual token k has the id -1-k, so a row with virtual tokens is still one list of ids, and
whatever cuts, pads or counts rows needs no second list beside it.
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
    """The ids around a prompt, for one tokenizer. Negative ones are virtual tokens."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def anchors(self) -> int:
        """How many real tokens stand around the prompt."""
        return sum(token >= 0 for token in (*self.before, *self.after))

    @property
    def in_front(self) -> int:
        """P where all virtual tokens come before every real one, else 0."""
        virtual = sum(token < 0 for token in (*self.before, *self.after))
        leading = sum(1 for _ in itertools.takewhile(lambda token: token < 0, self.before))
        return virtual if leading == virtual else 0

    def without_front(self) -> Arrangement:
        """What is left of it where the virtual tokens in front are already keys and values."""
        return Arrangement(self.before[self.in_front :], self.after)

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """A prompt's ids with what stands around them."""
        return [*self.before, *ids, *self.after]

    def row(self, row: Encoded) -> Encoded:
        """An encoded row with what stands around its prompt, unsupervised."""
        at = row.prompt_length
        ids = self.prompt(row.input_ids[:at])
        return Encoded([*ids, *row.input_ids[at:]], [IGNORE] * len(ids) + row.labels[at:])

    def judged_row(self, row: Encoded) -> Encoded:
        """As `row`, with the labels that the base model can predict too.

        Nothing precedes the first token of a row without a prompt, but for virtual tokens: it
        counts for nobody where prefixes are compared.
        """
        around = self.row(row)
        if row.prompt_length == 0 and row.labels:
            around.labels[len(self.before) + len(self.after)] = IGNORE
        return around


@dataclass(frozen=True)
class Layout:
    """A parsed template. `before` and `after` the prompt: numbers of virtual tokens, and text."""

    text: str
    before: tuple[int | str, ...]
    after: tuple[int | str, ...]

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Raises MethodError where the template cannot be understood."""
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
        """The layout with its words tokenised; each piece of text apart from its neighbours."""
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
        "the template of virtual tokens cannot be used",
        seen=f"{seen} in {text!r}",
        expected=_SYNTAX,
        fix="set method.template, for instance '{p:3}{prompt}{p:3}{completion}'",
    )
