"""A dense key-value cache of slots: one row each, written in place, read without copies.

Transformers sees a `Cache`; rows join, leave and stand at different lengths. A row's user
prefix lies in its first P columns as if it had been computed there. One rule keeps rows
apart in time: a query at column p sees columns 0..p of its own slot, and all of those were
written since the row joined. Released slots are zeroed all the same. What is traded: a slot
has room for the longest row (memory), where a paged cache would not.
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
    """What the next forward pass reads and writes.

    Slots `first..first+R-1`; new tokens of row r go to `columns[r]`, Long `[R, T]`; attention
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
        """Nothing to do: the tensors are made at once."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values `[R, H, T, D]`; returns what attention reads `[R, H, S, D]`."""
        view = self.view
        assert view is not None, "SlotCache.look comes before the model's call"
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
        """Columns before the new tokens, as far as one number can say it for all rows."""
        return self.view.width - self.view.columns.shape[1] if self.view else 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """`rows` slots for every layer; columns are added as rows get longer."""

    def __init__(
        self, facts: StackFacts, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots: list[SlotLayer] = [
            SlotLayer(facts.group_of(layer), rows, dtype, device)
            for layer in range(facts.layers - 1, -1, -1)  # counted from the top
        ]
        super().__init__(layers=list(self.slots))
        self.columns = BLOCK
        self._used = [0] * rows  # columns of each slot that may hold something

    def look(self, view: View) -> None:
        """Say what the next forward pass reads and writes, and make room for it."""
        end = int(view.columns.max()) + 1
        self._reserve(max(end, view.width))
        for slot in range(view.first, view.first + view.columns.shape[0]):
            self._used[slot] = max(self._used[slot], end)
        for layer in self.slots:
            layer.view = view

    def enter(self, slot: int, layers: Layers | None) -> None:
        """A new row begins in a slot: its user's keys `[H, P, Dk]` and values `[H, P, Dv]` fill
        the first P columns of the top K layers (below them these columns stay empty, and nobody
        may look at them)."""
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
        """Zero a slot: no trace of its row stays."""
        used, self._used[slot] = self._used[slot], 0
        for layer in self.slots:
            layer.keys[slot, :, :used] = 0
            layer.values[slot, :, :used] = 0

    def move(self, source: int, target: int) -> None:
        """The row of `source` goes on in `target`; `source` is zeroed."""
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
        # At least a quarter more, so that a long answer does not copy the cache every block.
        wanted = max(columns, self.columns * 5 // 4)
        self.columns = -(-wanted // BLOCK) * BLOCK
        for layer in self.slots:
            layer.grow(self.columns)
