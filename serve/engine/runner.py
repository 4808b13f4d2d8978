"""Forward passes over slots: prefill of new rows, and decoding steps of all rows.

Every call goes through `Backbone.step`, which plans masks and positions as for any other call. This
module only determines the columns of a row's tokens and prefix in the slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ptuning.errors import UnsupportedModel
from ptuning.model.attention_plan import Tokens
from ptuning.model.backbone import Backbone
from ptuning.model.batch import RowPrefix
from ptuning.model.facts import DECODER
from ptuning.model.groups import split_groups
from ptuning.prefix.ready import Member, rows_of
from serve.engine.slots import SlotCache, View


class Runner(Protocol):
    """Forward passes over slots, each with one row and its prefix. Not thread-safe."""

    def enter(self, slot: int, member: Member | None) -> None:
        """Put a new row's prefix (None: the base model) into its slot."""

    def leave(self, slot: int) -> None:
        """Empty the slot, without leaving a trace of its row."""

    def move(self, source: int, target: int) -> None:
        """Move the row of `source` to `target`; `source` is then empty."""

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits `[R, V]` after each prompt; row r is in slot `first + r`, which it has entered."""
        ...

    def decode(self, tokens: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Logits `[R, V]` after one more token in each of the slots 0..R-1, at these columns."""
        ...


def make_runner(backbone: Backbone, rows: int) -> Runner:
    """The runner for this backbone. Raises UnsupportedModel if there is none."""
    if backbone.facts.decoder_start_id is not None:
        from serve.engine.answer_runner import AnswerRunner

        return AnswerRunner(backbone, rows)
    return SlotRunner(backbone, rows)


@dataclass
class _Slot:
    """The state of a slot's row besides its keys and values."""

    member: Member | None = None
    prompt: int = 0  # tokens of the prompt, including virtual tokens at the input

    @property
    def length(self) -> int:
        """P, the columns before the row's first token."""
        return 0 if self.member is None else self.member.length


class SlotRunner:
    """A causal backbone with `rows` slots.

    The constructor raises UnsupportedModel if the model's layers cache anything but keys and
    values, or if its logits differ from those of the same model without slots.
    """

    def __init__(self, backbone: Backbone, rows: int) -> None:
        facts = backbone.facts.stacks.get(DECODER)
        if facts is None or len(backbone.facts.stacks) != 1:
            raise UnsupportedModel(
                "only models with one decoder stack have slots",
                seen=sorted(backbone.facts.stacks),
            )
        self.backbone = backbone
        self.cache = SlotCache(facts, rows, backbone.dtype, backbone.device)
        self._slots = [_Slot() for _ in range(rows)]
        self._prefixes: dict[tuple[int, int], RowPrefix | None] = {}  # of slots first, count
        self._check()

    def enter(self, slot: int, member: Member | None) -> None:
        self._slots[slot] = _Slot(member)
        self._prefixes.clear()
        self.cache.enter(slot, None if member is None else member.layers.get(DECODER))

    def leave(self, slot: int) -> None:
        self.cache.clear(slot)
        self._slots[slot] = _Slot()
        self._prefixes.clear()

    def move(self, source: int, target: int) -> None:
        self.cache.move(source, target)
        self._slots[target], self._slots[source] = self._slots[source], _Slot()
        self._prefixes.clear()

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        device = self.backbone.device
        slots = self._slots[first : first + len(prompts)]
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
            slots[row].prompt = len(prompt)
        # Padding is on the right, beyond the row's end, where the row's tokens overwrite it before
        # any query can attend to it.
        columns = [[slot.length + n for n in range(longest)] for slot in slots]
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        return self._step(first, ids.to(device), columns, last)

    def decode(self, tokens: Sequence[int], columns: Sequence[int]) -> Tensor:
        ids = torch.tensor(tokens, device=self.backbone.device)[:, None]
        return self._step(0, ids, [[column] for column in columns], None)

    def _step(
        self, first: int, ids: Tensor, columns: Sequence[Sequence[int]], last: Tensor | None
    ) -> Tensor:
        device, slots = self.backbone.device, self._slots[first : first + len(ids)]
        width = max(row[-1] for row in columns) + 1
        at = torch.tensor(columns, device=device)
        self.cache.look(View(first, at, width))
        prefix = self._prefix(first, len(ids))
        lengths = torch.zeros(len(ids), dtype=torch.long, device=device)
        if prefix is not None and prefix.lengths is not None:
            lengths = prefix.lengths
        return self.backbone.step(
            ids,
            Tokens.of_slots(at, lengths, width, last),
            prefix,
            self.cache,
            last,
            prompt_lengths=torch.tensor([slot.prompt for slot in slots], device=device),
        )

    def _prefix(self, first: int, count: int) -> RowPrefix | None:
        """The prefixes of slots `first..first+count-1`. They are in the cache, except for virtual
        tokens within the prompt. Memoised until a row enters, leaves or moves."""
        if (first, count) not in self._prefixes:
            members = [slot.member for slot in self._slots[first : first + count]]
            self._prefixes[first, count] = rows_of(self.backbone, members, cached=True)
        return self._prefixes[first, count]

    @torch.no_grad()
    def _check(self) -> None:
        """Check that a few tokens give equal logits with slots and without a cache.

        This is easier than supporting every architecture by name: whatever a model does with
        positions or its cache, it either works or is refused.
        """
        backbone, slots = self.backbone, 2 if len(self._slots) > 1 else 1
        ids = torch.arange(1, 6) % backbone.facts.vocab_size
        generator = torch.Generator().manual_seed(0)
        noise = {
            name: 0.1 * torch.randn(shape, generator=generator).to(backbone.device, backbone.dtype)
            for name, shape in backbone.facts.kv_shapes(3).items()
        }
        members = [Member(split_groups(noise, backbone.facts, 0)), None][:slots]
        for slot, member in enumerate(members):
            self.enter(slot, member)
        self.prefill(0, [ids[:-1].tolist()] * slots)
        columns = [len(ids) - 1 + self._slots[slot].length for slot in range(slots)]
        actual = self.decode([int(ids[-1])] * slots, columns)
        expected = torch.cat([_plain(backbone, ids, member) for member in members])
        for slot in range(slots):
            self.leave(slot)
        tolerance = (1e-3 if backbone.dtype == torch.float32 else 0.3) * float(expected.std())
        error = float((actual - expected).abs().max())
        if not error <= tolerance:  # true for NaN too
            raise UnsupportedModel(
                "the model's logits differ between a cache of slots and no cache",
                seen=f"logits differ by {error:.3g}",
                expected=f"at most {tolerance:.3g}",
                fix="serve a model with plain attention layers, such as Llama, Qwen or Mistral",
            )


def _plain(backbone: Backbone, ids: Tensor, member: Member | None) -> Tensor:
    """Logits `[1, V]` after `ids`, without a cache."""
    row = ids[None].to(backbone.device)
    tokens = Tokens.of_mask(torch.ones_like(row), row.shape[1])
    return backbone.step(row, tokens, rows_of(backbone, [member]), None)
