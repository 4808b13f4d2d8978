"""Plan a call's attention before the model is called: masks, positions, and who sees a prefix.

Everything here is a pure function of the rows' tokens, their prefixes and the model's layers. Real
tokens of a row are numbered from 0, its virtual ones -P_r..-1, wherever they lie: in columns put
before the keys, or in the first columns of a cache. Masks then compare numbers and nothing else,
so that training, generation and the service's slots share every line, and padding on either side
is no matter.

What is traded: masks are always materialised, one for all layers that see alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ptuning.errors import UnsupportedModel
from ptuning.model.batch import RowPrefix
from ptuning.model.facts import CROSS, DECODER, ENCODER


class Reach(NamedTuple):
    """Which tokens a layer lets each token attend to: those at most `back` tokens before it and
    `ahead` after it, in the same chunk of `chunk` tokens. None: no limit."""

    back: int | None = None
    ahead: int | None = None
    chunk: int | None = None

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Bool, of the shape to which the two tensors of real tokens' numbers broadcast."""
        conditions = []
        if self.back is not None:
            conditions.append(queries - keys <= self.back)
        if self.ahead is not None:
            conditions.append(keys - queries <= self.ahead)
        if self.chunk is not None:
            conditions.append(queries // self.chunk == keys // self.chunk)
        if not conditions:
            return torch.ones_like(queries - keys, dtype=torch.bool)
        return reduce(torch.logical_and, conditions)


class AttentionLayer(NamedTuple):
    """One attention layer of a model, number `number` of `layers` in its stack.

    `bias`, `[heads, N]`: the relative-position bias of each head for a virtual token n positions
    before the query, clamped at N-1; zeros `[heads, 1]` where virtual tokens stand nowhere.
    None where the layer takes no bias.
    """

    stack: str
    number: int
    layers: int
    reach: Reach
    bias: Tensor | None = None

    @property
    def below_top(self) -> int:
        """How many layers stand above it."""
        return self.layers - 1 - self.number


@dataclass(frozen=True)
class AttentionFacts:
    """A model's attention layers by stack, in order, and the dtype of its masks: bool, True where
    a token attends, or that of the scores to which they are added."""

    layers: Mapping[str, tuple[AttentionLayer, ...]]
    mask_dtype: torch.dtype


@dataclass(frozen=True)
class Tokens:
    """The tokens of one stack's call, by their numbers.

    `queries`, Long `[R, T]`: the new ones; `keys`, Long `[R, S]`: those in the key columns, new
    ones included, and virtual ones where these lie in the columns already (`cached`). `real`,
    bool `[R, S]`: False where a column is padding; None: nothing is that could be seen.
    """

    queries: Tensor
    keys: Tensor
    real: Tensor | None = None
    cached: bool = False

    @classmethod
    def of_mask(cls, mask: Tensor, new: int) -> Tokens:
        """Of a mask Long `[R, S]` over old and new tokens, the last `new` of which are new."""
        # Padding gets any valid number.
        numbers = (mask.cumsum(-1) - 1).clamp_min(0)
        return cls(numbers[:, -new:], numbers, mask.bool())

    @classmethod
    def of_columns(cls, queries: int, mask: Tensor) -> Tokens:
        """Of an encoder-decoder model, whose rows are padded on the right: columns count. `mask`,
        Long `[R, S]`, is that of the keys."""
        rows, device = len(mask), mask.device
        at = torch.arange(max(queries, mask.shape[1]), device=device).expand(rows, -1)
        return cls(at[:, :queries], at[:, : mask.shape[1]], mask.bool())

    @classmethod
    def of_slots(
        cls, columns: Tensor, lengths: Tensor, width: int, last: Tensor | None = None
    ) -> Tokens:
        """Of cache slots: new tokens at `columns`, Long `[R, T]`, row r's prefix in the first
        `lengths[r]` columns; the first `width` columns are read. What was not written yet is
        ahead of every query. New tokens beyond number `last[r]`, if given, are padding."""
        moved = lengths[:, None]
        queries = columns - moved
        if last is not None:
            queries = queries.minimum(last[:, None])
        return cls(queries, torch.arange(width, device=columns.device) - moved, cached=True)


def pair_tokens(mask: Tensor, answers: int) -> dict[str, Tokens]:
    """Of an encoder-decoder model's three stacks: sources under a mask Long `[R, T]`, and answers
    of so many columns."""
    columns = torch.ones((len(mask), answers), dtype=torch.bool, device=mask.device)
    return {
        ENCODER: Tokens.of_columns(mask.shape[1], mask),
        DECODER: Tokens.of_columns(answers, columns),
        CROSS: Tokens.of_columns(answers, mask),
    }


class AttentionInputs(NamedTuple):
    """What one layer's attention reads: keys and values of virtual tokens to put before its own,
    `[R, H, P, Dk]` and `[R, H, P, Dv]`, their bias `[1, heads, T, P]`, and the mask
    `[R, 1, T, P + S]`."""

    mask: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class AttentionPlan:
    """What every attention layer of one call reads, and where the decoder's tokens stand, Long
    `[R, T]`."""

    layers: Mapping[str, tuple[AttentionInputs, ...]]
    positions: Tensor | None

    def read(self, layer: AttentionLayer, _key: Tensor, _value: Tensor) -> AttentionInputs:
        return self.layers[layer.stack][layer.number]


def plan_attention(
    tokens: Mapping[str, Tokens],
    prefix: RowPrefix | None,
    facts: AttentionFacts,
    prompt_lengths: Tensor | None = None,
) -> AttentionPlan:
    """Plan a call over the stacks that `tokens` names.

    `prompt_lengths`, Long `[R]`: how many real tokens of each row are its prompt; an infix needs
    them. Raises UnsupportedModel where a prefix has more layers than the model.
    """
    prefix = prefix or RowPrefix({})
    first = prefix.first_with_prefix(prompt_lengths)
    layers = {}
    for stack in tokens.keys() & facts.layers.keys():  # some encoders attend in other ways
        _check_depth(stack, prefix, facts)
        layers[stack] = _plan_stack(
            facts.layers[stack], tokens[stack], prefix, first, facts.mask_dtype
        )
    decoder = tokens.get(DECODER)
    return AttentionPlan(layers, None if decoder is None else _positions(decoder, prefix, first))


def _check_depth(stack: str, prefix: RowPrefix, facts: AttentionFacts) -> None:
    given, most = len(prefix.layers.get(stack, ())), len(facts.layers[stack])
    if given > most:
        raise UnsupportedModel(
            "the prefix has keys and values for more layers than the model has",
            seen=f"{given} layers of the {stack} stack",
            expected=f"at most {most}",
        )


def _positions(tokens: Tokens, prefix: RowPrefix, first: Tensor | None) -> Tensor:
    """Real tokens stand where the prefix ends, those before an infix at the start."""
    queries = tokens.queries
    if not tokens.cached and DECODER not in prefix.layers:
        return queries
    if prefix.lengths is None:
        moved: Tensor | int = prefix.length
    else:
        moved = prefix.lengths[:, None]
        if DECODER in prefix.depths:  # some rows' prefixes are in other stacks alone
            moved = moved * (prefix.depths[DECODER] > 0)[:, None]
    return queries + (moved if first is None else moved * (queries >= first[:, None]))


def _plan_stack(
    layers: Sequence[AttentionLayer],
    tokens: Tokens,
    prefix: RowPrefix,
    first: Tensor | None,
    dtype: torch.dtype,
) -> tuple[AttentionInputs, ...]:
    masks: dict[tuple[Reach, bool, int | None], Tensor] = {}
    planned = []
    for layer in layers:
        kv = prefix.layers.get(layer.stack, ())
        enters = layer.below_top < len(kv)
        # Where rows' prefixes differ in depth, a layer has a mask of its own.
        depths = prefix.depths.get(layer.stack)
        key = (layer.reach, enters, None if depths is None else layer.below_top)
        if key not in masks:
            reached = None if depths is None else depths > layer.below_top
            sees = _sees(tokens, prefix, first, layer.reach, enters, reached)
            masks[key] = _as_mask(sees, dtype)
        if not enters:
            planned.append(AttentionInputs(masks[key]))
            continue
        keys, values = kv[len(kv) - 1 - layer.below_top]
        bias = _bias(layer, tokens.queries.shape[1], prefix.length)
        planned.append(AttentionInputs(masks[key], keys, values, bias))
    return tuple(planned)


def _sees(
    tokens: Tokens,
    prefix: RowPrefix,
    first: Tensor | None,
    reach: Reach,
    enters: bool,
    reached: Tensor | None,
) -> Tensor:
    """Bool `[R, T, S]`, or `[R, T, P + S]` where a prefix enters: which keys each token sees.
    `reached`, bool `[R]`: the rows whose prefix is that deep."""
    queries, keys = tokens.queries[:, :, None], tokens.keys[:, None, :]
    text = reach.sees(queries, keys)
    if tokens.real is not None:
        text = text & tokens.real[:, None, :]
    if tokens.cached:
        front = _sees_prefix(queries, keys, prefix, first, reach, reached)
        return torch.where(keys < 0, front, text)
    if not enters or not prefix.length:
        return text
    virtual = torch.arange(-prefix.length, 0, device=keys.device)[None, None]
    front = _sees_prefix(queries, virtual, prefix, first, reach, reached)
    return torch.cat([front.expand(*text.shape[:2], -1), text], dim=-1)


def _sees_prefix(
    queries: Tensor,  # [R, T, 1]
    virtual: Tensor,  # [R or 1, 1, P], negative numbers
    prefix: RowPrefix,
    first: Tensor | None,
    reach: Reach,
    reached: Tensor | None,
) -> Tensor:
    """Bool, of a shape that expands to `[R, T, P]`: which virtual tokens each token sees."""
    sees = virtual < 0
    if prefix.lengths is not None:
        sees = sees & (virtual >= -prefix.lengths[:, None, None])
    if reached is not None:
        sees = sees & reached[:, None, None]
    if first is not None:
        sees = sees & (queries >= first[:, None, None])
    if prefix.windowed is not None and reach.back is not None:
        near = queries - virtual <= reach.back
        sees = sees & (near | ~prefix.windowed[:, None, None])
    return sees


def _as_mask(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """`[R, 1, T, S]` as the attention takes it."""
    if dtype == torch.bool:
        return sees[:, None]
    shown = torch.zeros((), dtype=dtype, device=sees.device)
    return torch.where(sees[:, None], shown, torch.finfo(dtype).min)


def _bias(layer: AttentionLayer, queries: int, length: int) -> Tensor | None:
    """Virtual tokens end where the real ones begin. Shorter prefixes are padded on the left, so a
    column is as far from a token in every row."""
    if layer.bias is None:
        return None
    at = torch.arange(queries, device=layer.bias.device)[:, None]
    columns = torch.arange(-length, 0, device=layer.bias.device)
    distances = (at - columns).clamp_max(layer.bias.shape[-1] - 1)  # [T, P]
    return layer.bias[:, distances][None]
