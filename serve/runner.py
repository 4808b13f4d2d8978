"""Forward passes over slots: prefill of newcomers, one decoding step of all rows.

Every call goes through `Backbone.step` with a mask and positions made here, because no
model's own mask knows rows that stand at different columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import get_layer_types_and_kwargs

from ptuning.attention import RowPrefix
from ptuning.backbone import DECODER, Backbone
from ptuning.errors import UnsupportedModel
from serve.slots import SlotCache, View

FULL, SLIDING = "full_attention", "sliding_attention"


class SlotRunner:
    """The backbone with `rows` slots. One thread at a time.

    Raises UnsupportedModel at once where the model's layers keep something else than keys and
    values, or where its answers differ from the same model without slots.
    """

    def __init__(self, backbone: Backbone, rows: int) -> None:
        facts = backbone.facts.stacks.get(DECODER)
        if facts is None or len(backbone.facts.stacks) != 1:
            raise UnsupportedModel(
                "only models with one decoder stack can be served",
                seen=sorted(backbone.facts.stacks),
            )
        self.backbone = backbone
        self.cache = SlotCache(facts, rows, backbone.dtype, backbone.device)
        self._windows = _windows(backbone)
        # Transformers' eager attention adds its mask, SDPA takes a boolean one.
        self._adds_mask = "eager" in str(backbone.model.config._attn_implementation)  # type: ignore[union-attr]
        self._prefix_length = [0] * rows
        self._check()

    def enter(self, slot: int, kv_L2HPD: Tensor | None) -> None:
        """Put a newcomer's prefix (None: the base model) into its slot."""
        self.cache.enter(slot, kv_L2HPD)
        self._prefix_length[slot] = 0 if kv_L2HPD is None else int(kv_L2HPD.shape[-2])

    def leave(self, slot: int) -> None:
        self.cache.clear(slot)
        self._prefix_length[slot] = 0

    def move(self, source: int, target: int) -> None:
        self.cache.move(source, target)
        self._prefix_length[target] = self._prefix_length[source]
        self._prefix_length[source] = 0

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits `[R, V]` after each prompt; row r has slot `first + r` and has entered it."""
        device = self.backbone.device
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        offsets = torch.tensor(self._prefix_length[first : first + len(prompts)])
        # Padding is on the right: it is written beyond the row's end, which no query of the row
        # sees before its own tokens overwrite it.
        columns = torch.arange(longest)[None] + offsets[:, None]
        positions = columns.minimum((offsets + lengths - 1)[:, None])  # never past the row's end
        last = (lengths - 1).to(device)
        return self._step(first, ids.to(device), columns, positions, last)

    def decode(self, tokens: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Logits `[R, V]` after one more token of slots 0..R-1, each put at its own column."""
        at = torch.tensor(columns)[:, None]
        ids = torch.tensor(tokens)[:, None].to(self.backbone.device)
        return self._step(0, ids, at, at, None)

    def _step(
        self, first: int, ids: Tensor, columns: Tensor, positions: Tensor, last: Tensor | None
    ) -> Tensor:
        device = self.backbone.device
        width = int(columns.max()) + 1
        self.cache.look(View(first, columns.to(device), width))
        offsets = torch.tensor(self._prefix_length[first : first + len(ids)])
        masks = {
            kind: self._mask(columns, offsets, width, window).to(device)
            for kind, window in self._windows.items()
        }
        mask = next(iter(masks.values())) if len(masks) == 1 else masks
        return self.backbone.step(ids, mask, positions.to(device), None, self.cache, last)

    def _mask(self, columns: Tensor, offsets: Tensor, width: int, window: int | None) -> Tensor:
        """`[R, 1, T, S]`: own columns up to the query's, and the prefix whatever the window."""
        key = torch.arange(width)
        query = columns[:, :, None]
        seen = key <= query
        if window is not None:
            seen = seen & ((query - key < window) | (key < offsets[:, None, None]))
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
        backbone, slots = self.backbone, 2 if len(self._prefix_length) > 1 else 1
        ids = torch.arange(1, 6) % backbone.facts.vocab_size
        shape = backbone.facts.kv_shape(DECODER, 3)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        kv = (0.1 * noise).to(backbone.device, backbone.dtype)
        entered = [kv, None][:slots]
        for slot, prefix in enumerate(entered):
            self.enter(slot, prefix)
        self.prefill(0, [ids[:-1].tolist()] * slots)
        columns = [len(ids) - 1 + self._prefix_length[slot] for slot in range(slots)]
        seen = self.decode([int(ids[-1])] * slots, columns)
        wanted = torch.cat([_plain(backbone, ids, prefix) for prefix in entered])
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


def _plain(backbone: Backbone, ids: Tensor, kv_L2HPD: Tensor | None) -> Tensor:
    """Logits `[1, V]` after `ids` without any cache."""
    prefix, offset = None, 0
    if kv_L2HPD is not None:
        prefix, offset = RowPrefix({DECODER: kv_L2HPD[None].unbind(1)}), kv_L2HPD.shape[-2]
    row = ids[None].to(backbone.device)
    positions = torch.arange(len(ids), device=backbone.device)[None] + offset
    return backbone.step(row, torch.ones_like(row), positions, prefix, None)


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
