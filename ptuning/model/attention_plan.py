"""Plan a call's attention before the model is called: masks, positions and prefix visibility.

Everything here is a pure function of the rows' tokens, their prefixes and the model's layers. A
row's real tokens are numbered from 0 and its virtual tokens -P_r..-1, whether these are columns
put before the keys or the first columns of a cache. Masks only compare numbers, so training,
generation and the service's slots share the same code, and rows may be padded on either side.

The trade-off: masks are always materialised, one for all layers with the same visibility.
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
    """How far a layer's attention reaches: at most `back` tokens before the query and `ahead`
    after it, within the same chunk of `chunk` tokens. None: no limit."""

    back: int | None = None
    ahead: int | None = None
    chunk: int | None = None

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether each query attends to each key, given the numbers of real tokens: bool, of the
        broadcast shape."""
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
    before the query, clamped at N-1; zeros `[heads, 1]` if virtual tokens have no position.
    None if the layer takes no bias.
    """

    stack: str
    number: int
    layers: int
    reach: Reach
    bias: Tensor | None = None

    @property
    def below_top(self) -> int:
        """How many layers are above it."""
        return self.layers - 1 - self.number


@dataclass(frozen=True)
class AttentionFacts:
    """A model's attention layers by stack, in order, and the dtype of its masks: bool (True: the
    token attends), or the dtype of the scores that an additive mask is added to."""

    layers: Mapping[str, tuple[AttentionLayer, ...]]
    mask_dtype: torch.dtype


@dataclass(frozen=True)
class Tokens:
    """The tokens in a call of one stack, by number.

    `queries`, Long `[R, T]`: the new tokens. `keys`, Long `[R, S]`: the tokens in the key columns,
    new ones included; with `cached`, virtual tokens are among them. `real`, bool `[R, S]`: False
    where a column is padding; None: no query can attend to padding.
    """

    queries: Tensor
    keys: Tensor
    real: Tensor | None = None
    cached: bool = False

    @classmethod
    def of_mask(cls, mask: Tensor, new: int) -> Tokens:
        """From a mask, Long `[R, S]`, over all tokens; the last `new` columns are new."""
        # The number given to padding does not matter, as long as it is valid.
        numbers = (mask.cumsum(-1) - 1).clamp_min(0)
        return cls(numbers[:, -new:], numbers, mask.bool())

    @classmethod
    def of_columns(cls, queries: int, mask: Tensor) -> Tokens:
        """For an encoder-decoder model: its rows are padded on the right, so a token's number is
        its column. `mask`, Long `[R, S]`, is the mask of the keys."""
        rows, device = len(mask), mask.device
        at = torch.arange(max(queries, mask.shape[1]), device=device).expand(rows, -1)
        return cls(at[:, :queries], at[:, : mask.shape[1]], mask.bool())

    @classmethod
    def of_slots(
        cls, columns: Tensor, lengths: Tensor, width: int, last: Tensor | None = None
    ) -> Tokens:
        """For cache slots: new tokens at `columns`, Long `[R, T]`, after row r's prefix in the
        first `lengths[r]` columns; the first `width` columns are read. Columns not yet written lie
        ahead of every query. With `last`, new tokens beyond number `last[r]` are padding."""
        moved = lengths[:, None]
        queries = columns - moved
        if last is not None:
            queries = queries.minimum(last[:, None])
        return cls(queries, torch.arange(width, device=columns.device) - moved, cached=True)


def pair_tokens(mask: Tensor, answers: int) -> dict[str, Tokens]:
    """The tokens of an encoder-decoder model's three stacks: sources with a mask, Long `[R, T]`,
    and answers of `answers` columns."""
    columns = torch.ones((len(mask), answers), dtype=torch.bool, device=mask.device)
    return {
        ENCODER: Tokens.of_columns(mask.shape[1], mask),
        DECODER: Tokens.of_columns(answers, columns),
        CROSS: Tokens.of_columns(answers, mask),
    }


class AttentionInputs(NamedTuple):
    """What one layer's attention reads: the mask `[R, 1, T, P + S]`, and the keys `[R, H, P, Dk]`,
    values `[R, H, P, Dv]` and bias `[1, heads, T, P]` of virtual tokens, put before the row's."""

    mask: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class AttentionPlan:
    """What every attention layer of one call reads, and the positions of the decoder's tokens,
    Long `[R, T]`."""

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

    `prompt_lengths`, Long `[R]`: the number of real tokens in each row's prompt; an infix needs
    it. Raises UnsupportedModel if a prefix has more layers than the model.
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
    """Real tokens are positioned after the prefix; those before an infix start at 0."""
    queries = tokens.queries
    if not tokens.cached and DECODER not in prefix.layers:
        return queries
    if prefix.lengths is None:
        moved: Tensor | int = prefix.length
    else:
        moved = prefix.lengths[:, None]
        if DECODER in prefix.depths:  # some rows' prefixes are only in other stacks
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
        # If the rows' prefixes differ in depth, every layer needs its own mask.
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
    """Which keys each token attends to, bool `[R, T, S]`, or `[R, T, P + S]` if a prefix enters.
    `reached`, bool `[R]`: the rows whose prefix extends down to this layer."""
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
    """Which virtual tokens each token attends to: bool, of a shape that expands to `[R, T, P]`."""
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
    """The mask `[R, 1, T, S]` in the form that the attention function takes."""
    if dtype == torch.bool:
        return sees[:, None]
    shown = torch.zeros((), dtype=dtype, device=sees.device)
    return torch.where(sees[:, None], shown, torch.finfo(dtype).min)


def _bias(layer: AttentionLayer, queries: int, length: int) -> Tensor | None:
    """The relative-position bias of the virtual columns, `[1, heads, T, P]`. Virtual tokens end
    where real tokens begin, and shorter prefixes are padded on the left, so the distances are the
    same in every row."""
    if layer.bias is None:
        return None
    at = torch.arange(queries, device=layer.bias.device)[:, None]
    columns = torch.arange(-length, 0, device=layer.bias.device)
    distances = (at - columns).clamp_max(layer.bias.shape[-1] - 1)  # [T, P]
    return layer.bias[:, distances][None]
