"""Forward passes over slots: prefill of newcomers, one decoding step of all rows.

Every call goes through `Backbone.step`, which plans masks and positions as for any other call; all
that is said here is at which columns of the slots a row's tokens and its prefix lie.
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
    """Forward passes over slots, each with its own row and prefix. One thread at a time."""

    def enter(self, slot: int, member: Member | None) -> None:
        """Put a newcomer's prefix (None: the base model) into its slot."""

    def leave(self, slot: int) -> None:
        """The slot is empty; no trace of its row stays."""

    def move(self, source: int, target: int) -> None:
        """The row of `source` goes on in `target`; `source` is empty."""

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits `[R, V]` after each prompt; row r has slot `first + r` and has entered it."""
        ...

    def decode(self, tokens: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Logits `[R, V]` after one more token of slots 0..R-1, each put at its own column."""
        ...


def make_runner(backbone: Backbone, rows: int) -> Runner:
    """What runs this backbone; raises UnsupportedModel where nothing can."""
    if backbone.facts.decoder_start_id is not None:
        from serve.engine.answer_runner import AnswerRunner

        return AnswerRunner(backbone, rows)
    return SlotRunner(backbone, rows)


@dataclass
class _Slot:
    """What a slot's row needs besides its keys and values."""

    member: Member | None = None
    prompt: int = 0  # tokens of the prompt, virtual ones at the input too

    @property
    def length(self) -> int:
        """P, columns before the row's first token."""
        return 0 if self.member is None else self.member.length


class SlotRunner:
    """A causal backbone with `rows` slots.

    Raises UnsupportedModel at once where the model's layers keep something else than keys and
    values, or where its answers differ from the same model without slots.
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
        # Padding is on the right: it is written beyond the row's end, which no query of the row
        # sees before its own tokens overwrite it.
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
        """The prefixes of slots `first..first+count-1`, which lie in the cache but for virtual
        tokens among the prompt's. The same until a row comes, goes or moves."""
        if (first, count) not in self._prefixes:
            members = [slot.member for slot in self._slots[first : first + count]]
            self._prefixes[first, count] = rows_of(self.backbone, members, cached=True)
        return self._prefixes[first, count]

    @torch.no_grad()
    def _check(self) -> None:
        """A few tokens through the slots and through the plain model must give equal logits.

        Cheaper than knowing every architecture: whatever a model does with positions or its
        cache, it either works here or is refused.
        """
        backbone, slots = self.backbone, 2 if len(self._slots) > 1 else 1
        ids = torch.arange(1, 6) % backbone.facts.vocab_size
        generator = torch.Generator().manual_seed(0)
        noise = {
            name: 0.1 * torch.randn(shape, generator=generator).to(backbone.device, backbone.dtype)
            for name, shape in backbone.facts.kv_shapes(3).items()
        }
        entered = [Member(split_groups(noise, backbone.facts, 0)), None][:slots]
        for slot, member in enumerate(entered):
            self.enter(slot, member)
        self.prefill(0, [ids[:-1].tolist()] * slots)
        columns = [len(ids) - 1 + self._slots[slot].length for slot in range(slots)]
        seen = self.decode([int(ids[-1])] * slots, columns)
        wanted = torch.cat([_plain(backbone, ids, member) for member in entered])
        for slot in range(slots):
            self.leave(slot)
        tolerance = (1e-3 if backbone.dtype == torch.float32 else 0.3) * float(wanted.std())
        error = float((seen - wanted).abs().max())
        if not error <= tolerance:  # NaN is not
            raise UnsupportedModel(
                "the model answers differently with a cache of slots than without",
                seen=f"logits differ by {error:.3g}",
                expected=f"at most {tolerance:.3g}",
                fix="serve a model with plain attention layers, such as Llama, Qwen or Mistral",
            )


def _plain(backbone: Backbone, ids: Tensor, member: Member | None) -> Tensor:
    """Logits `[1, V]` after `ids` without any cache."""
    row = ids[None].to(backbone.device)
    tokens = Tokens.of_mask(torch.ones_like(row), row.shape[1])
    return backbone.step(row, tokens, rows_of(backbone, [member]), None)
