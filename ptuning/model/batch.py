"""The inputs of a backbone call: a batch's tokens and the prefix of every row.

Imports torch only, because configuration and methods use this and must load without Transformers.
Shapes: U users, R rows, K layers, H key-value heads, P virtual tokens, D head dimension, E hidden
size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptuning.model.facts import Facts
from ptuning.model.groups import Layers, split_groups
from ptuning.types import seed_of

EMBEDDINGS = "embeddings"  # the key, beside those of stacks, of virtual tokens at the input


@dataclass(frozen=True)
class Batch:
    """One microbatch. Rows are padded on the right.

    `input_ids`, `attention_mask`: Long `[R, T]`; negative ids are virtual tokens.
    `prompt_lengths`: Long `[R]`. Supervised position n predicts `targets[n]` from the hidden
    state at `(rows[n], cols[n])`; all three are Long `[N]`. With an encoder-decoder model
    `input_ids` are the encoder's and `decoder_input_ids` `[R, S]` the answer's, shifted right.
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
    """Which real tokens attend to the virtual tokens.

    `infix`: only the last prompt token and those after it; otherwise all. `windowed`: in layers
    with a sliding window, only tokens within the window, counted in positions, as if the prefix
    were in a cache; otherwise all.
    """

    infix: bool = False
    windowed: bool = False


@dataclass(frozen=True)
class Dropout:
    """Zero each value with probability `rate` and scale the rest.

    A hash of the row's seed and the value's index decides whether it is kept. It is computed on
    the values' device, does not depend on other rows, and is the same on every device.
    """

    rate: float
    seeds: tuple[int, ...]

    def __call__(self, name: str, values_R: Tensor) -> Tensor:
        device, count = values_R.device, values_R[0].numel()
        seeds = [seed_of(seed, name) for seed in self.seeds]
        low_R1 = torch.tensor(
            [_to_signed(seed) for seed in seeds], dtype=torch.int32, device=device
        )
        high_R1 = torch.tensor(
            [_to_signed(seed >> 32) for seed in seeds], dtype=torch.int32, device=device
        )
        indices = _mix(torch.arange(count, dtype=torch.int32, device=device))
        draws = _mix((indices ^ low_R1[:, None]) + high_R1[:, None])
        # A draw is a uniform 32-bit integer, the smallest being -2**31.
        keep = draws >= int(self.rate * 2**32) - 2**31
        return values_R * keep.view(values_R.shape).to(values_R) / (1.0 - self.rate)


def _to_signed(word: int) -> int:
    """The low 32 bits of a word as a signed integer: torch computes with signed integers only."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _mix(bits: Tensor) -> Tensor:
    """MurmurHash3's finaliser on int32 integers, as a new tensor: every bit affects every bit."""
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits.mul_(_to_signed(0x85EBCA6B))
    bits.bitwise_xor_((bits >> 13) & 0x7FFFF)
    bits.mul_(_to_signed(0xC2B2AE35))
    return bits.bitwise_xor_((bits >> 16) & 0xFFFF)


@dataclass(frozen=True)
class PackPrefix:
    """The prefixes of U users (slots), all of the same shapes, for a backbone with these facts.

    `tensors["decoder.0.keys"]` `[U, Lg, H, P, Dk]` and `….values` `[U, Lg, H, P, Dv]` belong to the
    top layers of a stack's first group (facts.py), with rotary embedding already applied to keys;
    `tensors["embeddings"]`, `[U, P, E]`, are virtual tokens at the input.
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

    `layers[stack]` are the keys (rotary embedding applied) `[R, H, P, Dk]` and values
    `[R, H, P, Dv]` of the stack's top K layers; empty if the prefixes are already in the first
    columns of a cache. `lengths`, Long `[R]`: the number of virtual tokens of each row, whose
    columns are padded on the left. None: all have P. `embeddings` `[R, P, E]` replace the row's
    negative ids (data/layout.py).
    `infix` and `windowed`, bool `[R]`: see Visibility; None: False for all rows.
    `depths[stack]`, Long `[R]`: how many of the stack's top layers row r's prefix covers, given
    if rows differ.
    """

    layers: dict[str, Layers]
    lengths: Tensor | None = None
    embeddings: Tensor | None = None
    infix: Tensor | None = None
    windowed: Tensor | None = None
    depths: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """P, the number of columns put before the row's keys."""
        first = next(iter(self.layers.values()), None)
        return 0 if first is None else int(first[0][0].shape[-2])

    def first_with_prefix(self, prompt_lengths_R: Tensor | None) -> Tensor | None:
        """The first real token of each row that attends to the prefix, Long `[R]`; None: all do."""
        if self.infix is None or prompt_lengths_R is None:
            return None
        return torch.where(self.infix, (prompt_lengths_R - 1).clamp_min(0), 0)
