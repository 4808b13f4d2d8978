"""What a call of the backbone takes: a batch's tokens, and the prefix of every row.

Torch alone: configuration and methods know these, and load without Transformers.
Shapes: U users, R rows, K layers, H key-value heads, P virtual tokens, D head dimension, E hidden
size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    """Zero each value with probability `rate` and scale the rest.

    Whether a value stays is a hash of its row's seed and its place in the row, computed where the
    values are: it depends on no neighbour, and is the same on every device.
    """

    rate: float
    seeds: tuple[int, ...]

    def __call__(self, name: str, values_R: Tensor) -> Tensor:
        device, count = values_R.device, values_R[0].numel()
        words = [seed_of(seed, name) for seed in self.seeds]
        low_R1 = torch.tensor([_signed(word) for word in words], dtype=torch.int32, device=device)
        high_R1 = torch.tensor(
            [_signed(word >> 32) for word in words], dtype=torch.int32, device=device
        )
        places = _mixed(torch.arange(count, dtype=torch.int32, device=device))
        draws = _mixed((places ^ low_R1[:, None]) + high_R1[:, None])
        # A uniform 32-bit word, as an integer from -2**31.
        stays = draws >= int(self.rate * 2**32) - 2**31
        return values_R * stays.view(values_R.shape).to(values_R) / (1.0 - self.rate)


def _signed(word: int) -> int:
    """The low 32 bits of a word as a signed integer, which is all that torch has."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _mixed(words: Tensor) -> Tensor:
    """MurmurHash3's finaliser on int32 words, a new tensor: every bit depends on every bit."""
    words = words ^ ((words >> 16) & 0xFFFF)
    words.mul_(_signed(0x85EBCA6B))
    words.bitwise_xor_((words >> 13) & 0x7FFFF)
    words.mul_(_signed(0xC2B2AE35))
    return words.bitwise_xor_((words >> 16) & 0xFFFF)


Layers = tuple[tuple[Tensor, Tensor], ...]  # keys and values of each layer, [R, H, P, D]


def split_layers(kv_RK2HPD: Tensor) -> Layers:
    """Each layer's keys and values.

    `unbind` rather than a slice per layer: the backward of K slices would add K tensors of the
    full size.
    """
    pairs = (kv_R2HPD.unbind(1) for kv_R2HPD in kv_RK2HPD.unbind(1))
    return tuple((keys, values) for keys, values in pairs)


@dataclass(frozen=True)
class PackPrefix:
    """The prefixes of U users (slots), all of one kind.

    `tensors[stack]` is `[U, K, 2, H, P, D]`, keys and values of the stack's top K layers, keys
    as after rotary embedding; `tensors["embeddings"]` is `[U, P, E]`, virtual tokens at the
    input.
    """

    tensors: dict[str, Tensor]
    visibility: Visibility = Visibility()

    def of_rows(
        self, slots_R: Tensor, dtype: torch.dtype, dropout: Dropout | None = None
    ) -> RowPrefix:
        """Gather each row's prefix (differentiable)."""
        rows = {name: kv.index_select(0, slots_R) for name, kv in self.tensors.items()}
        if dropout is not None:
            rows = {name: dropout(name, values) for name, values in rows.items()}
        embeddings = rows.pop(EMBEDDINGS, None)
        count = len(slots_R)
        return RowPrefix(
            {stack: split_layers(values.to(dtype)) for stack, values in rows.items()},
            embeddings=embeddings,
            infix=_flags(self.visibility.infix, count, slots_R.device),
            windowed=_flags(self.visibility.windowed, count, slots_R.device),
        )


def _flags(value: bool, rows: int, device: torch.device) -> Tensor | None:
    return torch.ones(rows, dtype=torch.bool, device=device) if value else None


@dataclass
class RowPrefix:
    """The prefix of every row of one batch.

    `layers[stack]` are the keys (as after rotary embedding) and values of the stack's top K
    layers; empty where the prefixes lie in the first columns of a cache already. `lengths`, Long
    `[R]`: how many virtual tokens each row has; the columns before them, on the left, are padding.
    None: all P. `embeddings` `[R, P, E]` stand where the row's ids are negative (data/layout.py).
    `infix` and `windowed`, bool `[R]`: see Visibility; None where it holds for no row.
    `depths[stack]`, Long `[R]`: how many of the stack's top layers row r's prefix has, where
    rows differ.
    """

    layers: dict[str, Layers]
    lengths: Tensor | None = None
    embeddings: Tensor | None = None
    infix: Tensor | None = None
    windowed: Tensor | None = None
    depths: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """P, the columns put before the row's own keys."""
        first = next(iter(self.layers.values()), None)
        return 0 if first is None else int(first[0][0].shape[-2])

    def first_with_prefix(self, prompt_lengths_R: Tensor | None) -> Tensor | None:
        """Each row's first real token that attends to the prefix, Long `[R]`; None: all do."""
        if self.infix is None or prompt_lengths_R is None:
            return None
        return torch.where(self.infix, (prompt_lengths_R - 1).clamp_min(0), 0)
