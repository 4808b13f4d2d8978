"""What a call of the backbone takes: a batch's tokens, and the prefix of every row.

Torch alone: configuration and methods know these, and load without Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptuning.model.facts import Facts
from ptuning.model.groups import Layers, split_groups
from ptuning.types import seed_of

EMBEDDINGS = "embeddings"  # the name, among stacks, of virtual tokens at the input


@dataclass(frozen=True)
class Batch:
    """One microbatch. Rows are padded on the right.

    `input_ids`, `attention_mask`: Long `[R, T]`; negative ids are virtual tokens.
    `prompt_lengths`: Long `[R]`. Supervised position n predicts `targets[n]` from the hidden
    state at `(rows[n], cols[n])`; all three are Long `[N]`. With an encoder-decoder model
    `input_ids` are the encoder's and `decoder_input_ids` `[R, S]` the answer's, moved by one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor
    rows: Tensor
    cols: Tensor
    targets: Tensor
    decoder_input_ids: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        moved = {
            name: value.to(device)
            for name in self.__dataclass_fields__
            if (value := getattr(self, name)) is not None
        }
        return Batch(**moved)


@dataclass(frozen=True)
class Visibility:
    """Which real tokens attend to the virtual ones.

    `infix`: only the last prompt token and those after it; else all. `windowed`: in layers with
    a sliding window only those within it, counted in positions, as where a prefix lies in a
    cache; else all.
    """

    infix: bool = False
    windowed: bool = False


@dataclass(frozen=True)
class Dropout:
    """Zero each value with probability `rate` and scale the rest; row r draws from `seeds[r]`,
    so that its draws depend on nothing else in the batch."""

    rate: float
    seeds: tuple[int, ...]

    def __call__(self, name: str, values_R: Tensor) -> Tensor:
        kept = torch.stack(
            [
                torch.rand(
                    values_R.shape[1:], generator=torch.Generator().manual_seed(seed_of(seed, name))
                )
                for seed in self.seeds
            ]
        )
        return values_R * (kept >= self.rate).to(values_R) / (1.0 - self.rate)


@dataclass(frozen=True)
class PackPrefix:
    """The prefixes of U users (slots), all of one kind, for a backbone of these facts.

    `tensors["decoder.0.keys"]` `[U, Lg, H, P, Dk]` and `….values` `[U, Lg, H, P, Dv]` are those of
    the top layers of a stack's first group (facts.py), keys as after rotary embedding;
    `tensors["embeddings"]` is `[U, P, E]`, virtual tokens at the input.
    """

    tensors: dict[str, Tensor]
    facts: Facts
    visibility: Visibility = Visibility()

    def of_rows(
        self, slots_R: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> RowPrefix:
        """Gather each row's prefix (differentiable)."""
        rows = {name: p.index_select(0, slots_R) for name, p in self.tensors.items()}
        if dropout is not None:
            rows = {name: dropout(name, values) for name, values in rows.items()}
        embeddings = rows.pop(EMBEDDINGS, None)
        count = len(slots_R)
        return RowPrefix(
            split_groups({name: p.to(dtype) for name, p in rows.items()}, self.facts, 1),
            embeddings=embeddings,
            infix=_flags(self.visibility.infix, count, slots_R.device),
            windowed=_flags(self.visibility.windowed, count, slots_R.device),
        )


def _flags(value: bool, rows: int, device: torch.device) -> Tensor | None:
    return torch.ones(rows, dtype=torch.bool, device=device) if value else None


@dataclass
class RowPrefix:
    """The prefix of every row of one batch.

    `layers[stack]` are the keys (as after rotary embedding) `[R, H, P, Dk]` and values
    `[R, H, P, Dv]` of the stack's top K layers. `visible` is a bool `[R, P]` where rows have
    prefixes of different lengths (or none): False columns are padding, on the left. None means
    that every column is visible. `embeddings` `[R, P, E]` stand where the row's ids are negative
    (data/layout.py).
    `infix` and `windowed`, bool `[R]`: see Visibility; None where it holds for no row.
    `depths[stack]`, Long `[R]`: how many of the stack's top layers row r's prefix has, where
    rows differ.
    """

    layers: dict[str, Layers]
    visible: Tensor | None = None
    embeddings: Tensor | None = None
    infix: Tensor | None = None
    windowed: Tensor | None = None
    depths: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """P, the columns put before the row's own keys."""
        first = next(iter(self.layers.values()), None)
        return 0 if first is None else int(first[0][0].shape[-2])

    def offsets(self, rows: int) -> Tensor:
        """How many virtual keys each row has, Long `[R]`: how far real positions are moved."""
        if self.visible is None:
            return torch.full((rows,), self.length, dtype=torch.long)
        return self.visible.sum(-1)

    def after(self, prompt_lengths_R: Tensor) -> Tensor | None:
        """Each row's first real token that sees the prefix, Long `[R]`; None: all do."""
        if self.infix is None:
            return None
        return torch.where(self.infix, (prompt_lengths_R - 1).clamp_min(0), 0)


@dataclass(frozen=True)
class CachedPrefix:
    """Prefixes in a cache's first columns: how many columns and top layers each row has, both
    Long `[R]` on the CPU."""

    lengths: Tensor
    layers: Tensor
