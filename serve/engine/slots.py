"""A dense key-value cache of slots, one row each, written in place and read without copies.

To Transformers it is a `Cache`, but rows join, leave and have different lengths. A user's prefix is
in the row's first P columns, as if it had been computed there. One rule isolates successive rows: a
query at column p attends to columns 0..p of its slot, all of which were written after the row
joined. Released slots are zeroed nevertheless. The trade-off: every slot has room for the longest
row, which costs more memory than a paged cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ptuning.model.facts import GroupFacts, StackFacts
from ptuning.model.groups import Layers

BLOCK = 64  # columns are added in multiples of this


@dataclass(frozen=True)
class View:
    """The columns that the next forward pass reads and writes.

    It uses slots `first..first+R-1`, writes row r's new tokens to `columns[r]`, Long `[R, T]`, and
    reads the first `width` columns.
    """

    first: int
    columns: Tensor
    width: int


class SlotLayer(CacheLayerMixin):
    """One layer's keys `[rows, H, S, Dk]` and values `[rows, H, S, Dv]`."""

    def __init__(
        self, facts: GroupFacts, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        shape = (rows, facts.heads, BLOCK)
        self.keys: Tensor = torch.zeros((*shape, facts.key_width), dtype=dtype, device=device)
        self.values: Tensor = torch.zeros((*shape, facts.value_width), dtype=dtype, device=device)
        self.view: View | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: the constructor makes the tensors."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values `[R, H, T, D]`; returns what attention reads `[R, H, S, D]`."""
        view = self.view
        assert view is not None, "call SlotCache.look before the model"
        count = key_states.shape[0]
        keys = self.keys[view.first : view.first + count]
        values = self.values[view.first : view.first + count]
        rows = torch.arange(count, device=keys.device)[:, None]
        keys[rows, :, view.columns] = key_states.transpose(1, 2)
        values[rows, :, view.columns] = value_states.transpose(1, 2)
        return keys[:, :, : view.width], values[:, :, : view.width]

    def grow(self, columns: int) -> None:
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros((*old.shape[:2], columns, old.shape[3]))
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.view.width if self.view else query_length), 0

    def get_seq_length(self) -> int:
        """Columns before the new tokens, as a single number for all rows."""
        return self.view.width - self.view.columns.shape[1] if self.view else 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """`rows` slots in every layer; columns are added as rows get longer."""

    def __init__(
        self, facts: StackFacts, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots: list[SlotLayer] = [
            SlotLayer(facts.group_of(layer), rows, dtype, device)
            for layer in range(facts.layers - 1, -1, -1)  # counted from the top
        ]
        super().__init__(layers=list(self.slots))
        self.columns = BLOCK
        self._used = [0] * rows  # columns of each slot that may be non-zero

    def look(self, view: View) -> None:
        """Set what the next forward pass reads and writes, and make room for it."""
        end = int(view.columns.max()) + 1
        self._reserve(max(end, view.width))
        for slot in range(view.first, view.first + view.columns.shape[0]):
            self._used[slot] = max(self._used[slot], end)
        for layer in self.slots:
            layer.view = view

    def enter(self, slot: int, layers: Layers | None) -> None:
        """Start a new row in a slot: its prefix's keys `[H, P, Dk]` and values `[H, P, Dv]` fill
        the first P columns of the top K layers. In lower layers these columns stay empty and must
        be masked."""
        self.clear(slot)
        if not layers:
            return
        length = layers[0][0].shape[-2]
        self._reserve(length)
        self._used[slot] = length
        for layer, (keys, values) in zip(self.slots[-len(layers) :], layers, strict=True):
            layer.keys[slot, :, :length] = keys
            layer.values[slot, :, :length] = values

    def clear(self, slot: int) -> None:
        """Zero a slot, so that no trace of its row remains."""
        used, self._used[slot] = self._used[slot], 0
        for layer in self.slots:
            layer.keys[slot, :, :used] = 0
            layer.values[slot, :, :used] = 0

    def move(self, source: int, target: int) -> None:
        """Move the row of `source` to `target`; `source` is zeroed."""
        self.clear(target)
        used = self._used[source]
        for layer in self.slots:
            layer.keys[target, :, :used] = layer.keys[source, :, :used]
            layer.values[target, :, :used] = layer.values[source, :, :used]
        self._used[target] = used
        self.clear(source)

    def _reserve(self, columns: int) -> None:
        if columns <= self.columns:
            return
        # Grow by at least a quarter, so that a long answer does not copy the cache for every block.
        wanted = max(columns, self.columns * 5 // 4)
        self.columns = -(-wanted // BLOCK) * BLOCK
        for layer in self.slots:
            layer.grow(self.columns)
