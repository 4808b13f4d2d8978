"""Forward passes over slots: prefill of newcomers, one decoding step of all rows.

Every call goes through `Backbone.step` with a mask and positions made here, because no
model's own mask knows rows that stand at different columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers.cache_utils import get_layer_types_and_kwargs

from ptuning.errors import UnsupportedModel
from ptuning.model.backbone import Backbone
from ptuning.model.batch import CachedPrefix, RowPrefix
from ptuning.model.facts import DECODER
from ptuning.model.groups import split_groups
from ptuning.prefix.ready import Member, rows_of
from serve.engine.slots import SlotCache, View

FULL, SLIDING = "full_attention", "sliding_attention"


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

    @property
    def after(self) -> int:
        """The row's first token that sees the prefix."""
        infix = self.member is not None and self.member.visibility.infix
        return max(0, self.prompt - 1) if infix else 0

    @property
    def windowed(self) -> bool:
        return self.member is not None and self.member.visibility.windowed

    def depth(self, layers: int) -> int:
        """K, the top layers with a prefix; all of them where there is none to hide."""
        return len(self.member.layers[DECODER]) if self.member and self.length else layers


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
        self._layers = facts.layers
        self._windows = _windows(backbone)
        # Transformers' eager attention adds its mask, SDPA takes a boolean one.
        self._adds_mask = "eager" in str(backbone.model.config._attn_implementation)  # type: ignore[union-attr]
        self._slots = [_Slot() for _ in range(rows)]
        self._check()

    def enter(self, slot: int, member: Member | None) -> None:
        self._slots[slot] = _Slot(member)
        self.cache.enter(slot, None if member is None else member.layers.get(DECODER))

    def leave(self, slot: int) -> None:
        self.cache.clear(slot)
        self._slots[slot] = _Slot()

    def move(self, source: int, target: int) -> None:
        self.cache.move(source, target)
        self._slots[target], self._slots[source] = self._slots[source], _Slot()

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        device = self.backbone.device
        slots = self._slots[first : first + len(prompts)]
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
            slots[row].prompt = len(prompt)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        offsets = torch.tensor([slot.length for slot in slots])
        # Padding is on the right: it is written beyond the row's end, which no query of the row
        # sees before its own tokens overwrite it.
        columns = torch.arange(longest)[None] + offsets[:, None]
        last = (lengths - 1).to(device)
        embeddings = None
        if any(slot.member is not None and slot.member.embeddings is not None for slot in slots):
            embeddings = rows_of(
                self.backbone,
                [slot.member and replace(slot.member, layers={}) for slot in slots],
            )
        return self._step(first, ids.to(device), columns, last, embeddings)

    def decode(self, tokens: Sequence[int], columns: Sequence[int]) -> Tensor:
        at = torch.tensor(columns)[:, None]
        ids = torch.tensor(tokens)[:, None].to(self.backbone.device)
        return self._step(0, ids, at, None, None)

    def _step(
        self,
        first: int,
        ids: Tensor,
        columns: Tensor,
        last: Tensor | None,
        embeddings: RowPrefix | None,
    ) -> Tensor:
        device = self.backbone.device
        width = int(columns.max()) + 1
        self.cache.look(View(first, columns.to(device), width))
        slots = self._slots[first : first + len(ids)]
        masks = {
            kind: self._mask(columns, slots, width, window).to(device)
            for kind, window in self._windows.items()
        }
        mask = next(iter(masks.values())) if len(masks) == 1 else masks
        return self.backbone.step(
            ids,
            mask,
            self._positions(columns, slots, last).to(device),
            embeddings,
            self.cache,
            last,
            cached=self._shallow(slots),
        )

    def _positions(self, columns: Tensor, slots: Sequence[_Slot], last: Tensor | None) -> Tensor:
        """Where each token stands: at its column, or, before an infix, as if there were none."""
        lengths = torch.tensor([slot.length for slot in slots])[:, None]
        before = columns - lengths < torch.tensor([slot.after for slot in slots])[:, None]
        positions = torch.where(before, columns - lengths, columns)
        if last is not None:  # padding: never past the row's end
            positions = positions.minimum(lengths + last.cpu()[:, None])
        return positions

    def _shallow(self, slots: Sequence[_Slot]) -> CachedPrefix | None:
        """The rows' prefixes, where one of them has fewer layers than the model."""
        depths = [slot.depth(self._layers) for slot in slots]
        if min(depths) == self._layers:
            return None
        return CachedPrefix(torch.tensor([slot.length for slot in slots]), torch.tensor(depths))

    def _mask(
        self, columns: Tensor, slots: Sequence[_Slot], width: int, window: int | None
    ) -> Tensor:
        """`[R, 1, T, S]`: own columns up to the query's, and the prefix as its Visibility says."""
        key = torch.arange(width)
        query = columns[:, :, None]
        lengths = torch.tensor([slot.length for slot in slots])[:, None, None]
        inside = key < lengths
        seen = key <= query
        if window is not None:
            windowed = torch.tensor([slot.windowed for slot in slots])[:, None, None]
            seen = seen & ((query - key < window) | (inside & ~windowed))
        if any(slot.after for slot in slots):
            after = torch.tensor([slot.after for slot in slots])[:, None, None]
            seen = seen & ~(inside & (query - lengths < after))
        seen = seen[:, None]
        if not self._adds_mask:
            return seen
        dtype = self.backbone.dtype
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

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
    index = torch.arange(len(ids), device=backbone.device)[None]
    return backbone.step(row, torch.ones_like(row), index, rows_of(backbone, [member]), None)


def _windows(backbone: Backbone) -> dict[str, int | None]:
    """The model's kinds of layers, each with its sliding window in tokens (None: sees all)."""
    config = backbone.model.config.get_text_config()  # type: ignore[union-attr, operator]
    kinds, settings = get_layer_types_and_kwargs(config)
    unknown = set(kinds) - {FULL, SLIDING}
    if unknown:
        raise UnsupportedModel(
            "the model has layers that keep more than keys and values",
            seen=", ".join(sorted(unknown)),
            expected=f"{FULL} or {SLIDING}",
        )
    return {
        kind: setting.get("sliding_window") for kind, setting in zip(kinds, settings, strict=True)
    }
