"""The one place where a prefix meets the model.

Transformers calls a registered attention function in every attention layer and hands down
the keyword arguments of `model(...)`. Ours puts each row's prefix keys and values before the
row's own and widens the mask by P visible columns. What is traded: the attention mask is
always materialised (SDPA's `is_causal` shortcut cannot express the extra columns), and a
model that does not use the interface is refused rather than silently run without prefix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ptuning.errors import UnsupportedModel
from ptuning.model.batch import CachedPrefix, RowPrefix

KINDS = ("eager", "sdpa")
# The keyword argument of model(...) that carries a call's AttentionContext to every layer.
CONTEXT = "ptuning_context"
_LAYER = "_ptuning_layer"


@dataclass(frozen=True)
class AttentionCall:
    """What one attention module was called with. Shapes are (H, D); `queries` and `keys` are
    numbers of tokens; `causal`: the first token did not see the last."""

    module: nn.Module
    key_shape: tuple[int, int]
    value_shape: tuple[int, int]
    queries: int
    keys: int
    causal: bool

    @classmethod
    def of(
        cls, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> AttentionCall:
        seen = None if mask is None else mask[0, 0, 0, -1]
        causal = seen is not None and (not bool(seen) if seen.dtype == torch.bool else seen < 0)
        return cls(
            module,
            (key.shape[1], key.shape[3]),
            (value.shape[1], value.shape[3]),
            query.shape[2],
            key.shape[2],
            bool(causal),
        )


class Place(NamedTuple):
    """Where an attention module stands: its stack, its layer there, and how many there are.

    `before`, `[heads, N]`, is what a head adds to the score of a virtual token n places before
    the one that looks (from N-1 on it stays the same); None: nothing.
    """

    stack: str
    layer: int
    layers: int
    before: Tensor | None = None

    @property
    def below_top(self) -> int:
        """How many layers stand above it."""
        return self.layers - 1 - self.layer


@dataclass
class AttentionContext:
    """What one call of the backbone tells its attention layers, and what they tell back.

    `index`, Long `[R, T]`, is each token's number among its row's real tokens (None: its column,
    as in an encoder-decoder model, whose stacks have rows of their own lengths); `after`, Long
    `[R]`, the first of them that sees the prefix (None: all do). `answer_positions`, Long
    `[R, S]`: where an encoder-decoder model's answer stands. `cached`: prefixes that lie in the
    cache's first columns already.
    """

    prefix: RowPrefix | None = None
    index: Tensor | None = None
    answer_positions: Tensor | None = None
    after: Tensor | None = None
    cached: CachedPrefix | None = None
    capture: bool = False
    record_modules: bool = False
    used: set[tuple[str, int]] = field(default_factory=set)
    captured: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    embedded: Tensor | None = None
    calls: list[AttentionCall] = field(default_factory=list)
    _masks: dict[tuple[int, object], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def positions(self) -> Tensor:
        """Where each token stands, `[R, T]`: real tokens where the prefix ends, those before an
        infix at the start."""
        assert self.index is not None
        if self.prefix is None:
            return self.index
        moved = self.prefix.offsets(len(self.index)).to(self.index)[:, None]
        if self.after is not None:
            moved = moved * (self.index >= self.after[:, None])
        return self.index + moved

    def widened(self, mask: Tensor, prefix: RowPrefix, window: int | None, place: Place) -> Tensor:
        """The layer's mask `[R, 1, T, S]` widened by P columns; made once per mask, not layer."""
        key = (id(mask), (window, place[:2]) if place.stack in prefix.depths else window)
        made = self._masks.get(key)
        if made is not None and made[0] is mask:
            return made[1]
        wide = functional.pad(mask, (prefix.length, 0), value=_shown(mask))
        seen = self._seen(prefix, window, place, mask)
        if seen is not None:
            seen = seen[:, None].expand(*wide.shape[:3], -1)
            wide[..., : prefix.length] = wide[..., : prefix.length].masked_fill(
                ~seen, _hidden(mask)
            )
        self._masks[key] = (mask, wide)
        return wide

    def _seen(
        self, prefix: RowPrefix, window: int | None, place: Place, mask: Tensor
    ) -> Tensor | None:
        """Bool `[R, T or 1, P]`: which virtual tokens each token sees; None where it is all."""
        seen = None if prefix.visible is None else prefix.visible[:, None, :]
        if place.stack in prefix.depths:
            reaches = (prefix.depths[place.stack] > place.below_top)[:, None, None]
            seen = reaches if seen is None else seen & reaches
        if self.after is not None:
            assert self.index is not None
            inside = (self.index >= self.after[:, None])[:, :, None]
            seen = inside if seen is None else seen & inside
        if window is not None and prefix.windowed is not None:
            index = self.index
            if index is None:
                index = torch.arange(mask.shape[-2], device=mask.device)[None]
            # Virtual token c of a row with P_r of them, padded on the left to P, is at position
            # c - (P - P_r); the row's real token i is at P_r + i.
            columns = torch.arange(prefix.length, device=index.device) - prefix.length
            near = index[:, :, None] - columns < window
            near = near | ~prefix.windowed[:, None, None]
            seen = near if seen is None else seen & near
        if seen is not None and prefix.length:
            return seen.expand(-1, -1, prefix.length)
        return seen

    def hiding(self, mask: Tensor, place: Place) -> Tensor:
        """The mask with the cached columns of prefixes that do not reach down to this layer."""
        assert self.cached is not None
        shallow = self.cached.layers <= place.below_top  # [R]
        if not bool(shallow.any()):
            return mask
        key = (id(mask), tuple(shallow.tolist()))
        made = self._masks.get(key)
        if made is not None and made[0] is mask:
            return made[1]
        columns = torch.arange(mask.shape[-1])
        hide = shallow[:, None] & (columns < self.cached.lengths[:, None])  # [R, S]
        hidden = mask.masked_fill(hide[:, None, None, :].to(mask.device), _hidden(mask))
        self._masks[key] = (mask, hidden)
        return hidden


def _shown(mask: Tensor) -> float | bool:
    return True if mask.dtype == torch.bool else 0.0


def _hidden(mask: Tensor) -> float | bool:
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def place_of(module: nn.Module) -> Place | None:
    """The place that `mark_layer` gave a module, if it gave one."""
    place: Place | None = getattr(module, _LAYER, None)
    return place


def layer_of(module: nn.Module) -> Place:
    """The place of an attention module."""
    place = place_of(module)
    if place is None:
        raise UnsupportedModel(
            "an attention module was called that was not seen when the backbone was loaded",
            seen=type(module).__name__,
        )
    return place


def mark_layer(module: nn.Module, place: Place) -> None:
    """Give an attention module its place: encoder and decoder layers share layer indices."""
    setattr(module, _LAYER, place)


AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def _own_eager(module: nn.Module) -> AttentionFunction:
    """The eager attention of the model's own file: exact for soft caps, sinks and biases."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise UnsupportedModel(
            "the model has no eager attention function to build on",
            seen=type(module).__name__,
            fix="set backbone.attention to 'sdpa'",
        )
    return function


def _with_prefix(base: Callable[[nn.Module], AttentionFunction]) -> AttentionFunction:
    def attend(
        module: nn.Module,
        query: Tensor,  # [R, heads, T, D]
        key: Tensor,  # [R, H, S, D]
        value: Tensor,  # [R, H, S, D]
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        context: AttentionContext | None = kwargs.pop(CONTEXT, None)
        if context is not None:
            if context.record_modules:
                context.calls.append(AttentionCall.of(module, query, key, value, attention_mask))
            if context.capture:
                context.captured[layer_of(module)[:2]] = (key, value)
            if context.cached is not None and attention_mask is not None:
                attention_mask = context.hiding(attention_mask, layer_of(module))
            if context.prefix is not None and context.prefix.layers:
                key, value, attention_mask = _prepend(
                    context, module, key, value, attention_mask, kwargs
                )
        return base(module)(module, query, key, value, attention_mask, **kwargs)

    return attend


def _prepend(
    context: AttentionContext,
    module: nn.Module,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None]:
    prefix, place = context.prefix, layer_of(module)
    assert prefix is not None
    layers = prefix.layers.get(place.stack, ())
    if place.below_top >= len(layers):
        return key, value, attention_mask
    if attention_mask is None:
        raise UnsupportedModel(
            "the model calls attention without a mask, so a prefix cannot be made visible safely",
            seen=type(module).__name__,
        )
    keys, values = layers[len(layers) - 1 - place.below_top]  # [R, H, P, Dk], [R, H, P, Dv]
    context.used.add(place[:2])
    bias = kwargs.get("position_bias")  # [1, heads, T, S]
    if bias is not None:
        kwargs["position_bias"] = _biased_before(bias, prefix.length, place.before)
    return (
        torch.cat([keys, key], dim=2),
        torch.cat([values, value], dim=2),
        context.widened(attention_mask, prefix, kwargs.get("sliding_window"), place),
    )


def _biased_before(bias: Tensor, length: int, before: Tensor | None) -> Tensor:
    """A bias by relative position `[1, heads, T, S]`, widened by P virtual tokens that end where
    the real ones begin. Shorter prefixes are padded on the left, so a column is as far from a
    token in every row."""
    if before is None:
        return functional.pad(bias, (length, 0))
    tokens = torch.arange(bias.shape[-2], device=bias.device)[:, None]
    columns = torch.arange(length, device=bias.device) - length
    distances = (tokens - columns).clamp_max(before.shape[-1] - 1)  # [T, P]
    return torch.cat([before[:, distances][None], bias], dim=-1)


def _full_sdpa_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """SDPA's boolean mask, never None: the shortcuts are wrong with P extra columns."""
    kwargs["allow_is_causal_skip"] = False
    kwargs["allow_is_bidirectional_skip"] = False
    return sdpa_mask(*args, **kwargs)


def _full_eager_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    kwargs["allow_is_bidirectional_skip"] = False
    return eager_mask(*args, **kwargs)


def implementation(kind: str) -> str:
    """The name to load a model with (`attn_implementation=`); registers it at first use."""
    name = f"ptuning_{kind}"
    if kind == "sdpa":
        AttentionInterface.register(name, _with_prefix(lambda _module: sdpa_attention_forward))
        AttentionMaskInterface.register(name, _full_sdpa_mask)
    elif kind == "eager":
        AttentionInterface.register(name, _with_prefix(_own_eager))
        AttentionMaskInterface.register(name, _full_eager_mask)
    else:
        raise ValueError(f"attention is one of {KINDS}, not {kind!r}")
    return name
