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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ptuning.errors import UnsupportedModel

KINDS = ("eager", "sdpa")
# The keyword argument of model(...) that carries a call's AttentionContext to every layer.
CONTEXT = "ptuning_context"
_LAYER = "_ptuning_layer"


@dataclass
class RowPrefix:
    """Prefix keys and values of every row of one batch.

    `layers[stack][l]` is `[R, 2, H, P, D]`: keys (as after rotary embedding) and values.
    `visible` is a bool `[R, P]` where rows have prefixes of different lengths (or none):
    False columns are padding, on the left. None means that every column is visible.
    """

    layers: dict[str, tuple[Tensor, ...]]
    visible: Tensor | None = None

    @classmethod
    def of_slots(
        cls, kv_ULPHD: dict[str, Tensor], slots_R: Tensor, dtype: torch.dtype
    ) -> RowPrefix:
        """Gather each row's prefix from a pack's `[U, L, 2, H, P, D]` (differentiable).

        `unbind` rather than a slice per layer: the backward of L slices would add L tensors
        of the full size.
        """
        return cls(
            {
                stack: kv.index_select(0, slots_R).to(dtype).unbind(1)
                for stack, kv in kv_ULPHD.items()
            }
        )

    @property
    def length(self) -> int:
        """P, the columns put before the row's own keys."""
        first = next(iter(self.layers.values()))[0]
        return int(first.shape[-2])

    def offsets(self, rows: int) -> Tensor:
        """How many virtual tokens each row has, Long `[R]`: where its real positions start."""
        if self.visible is None:
            return torch.full((rows,), self.length, dtype=torch.long)
        return self.visible.sum(-1)


@dataclass(frozen=True)
class AttentionCall:
    """What one attention module was called with. Shapes are (H, D); `causal`: the first token
    did not see the last (of two)."""

    module: nn.Module
    key_shape: tuple[int, int]
    value_shape: tuple[int, int]
    causal: bool

    @classmethod
    def of(
        cls, module: nn.Module, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> AttentionCall:
        seen = None if mask is None else mask[0, 0, 0, -1]
        causal = seen is not None and (not bool(seen) if seen.dtype == torch.bool else seen < 0)
        return cls(
            module, (key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]), bool(causal)
        )


@dataclass
class AttentionContext:
    """What one call of the backbone tells its attention layers, and what they tell back."""

    prefix: RowPrefix | None = None
    capture: bool = False
    record_modules: bool = False
    used: set[tuple[str, int]] = field(default_factory=set)
    captured: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    calls: list[AttentionCall] = field(default_factory=list)
    _masks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def widened(self, mask: Tensor, prefix: RowPrefix) -> Tensor:
        """The layer's mask `[R, 1, T, S]` widened by P columns; made once per mask, not layer."""
        made = self._masks.get(id(mask))
        if made is not None and made[0] is mask:
            return made[1]
        is_bool = mask.dtype == torch.bool
        wide = functional.pad(mask, (prefix.length, 0), value=True if is_bool else 0.0)
        if prefix.visible is not None:
            hidden = ~prefix.visible[:, None, None, :].expand(*wide.shape[:3], -1)
            blocked = False if is_bool else torch.finfo(mask.dtype).min
            wide[..., : prefix.length] = wide[..., : prefix.length].masked_fill(hidden, blocked)
        self._masks[id(mask)] = (mask, wide)
        return wide


def layer_of(module: nn.Module) -> tuple[str, int]:
    """The (stack, layer) that `mark_layer` gave this attention module."""
    place: tuple[str, int] | None = getattr(module, _LAYER, None)
    if place is None:
        raise UnsupportedModel(
            "an attention module was called that was not seen when the backbone was loaded",
            seen=type(module).__name__,
        )
    return place


def mark_layer(module: nn.Module, stack: str, layer: int) -> None:
    """Give an attention module its place: encoder and decoder layers share layer indices."""
    setattr(module, _LAYER, (stack, layer))


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
                context.calls.append(AttentionCall.of(module, key, value, attention_mask))
            if context.capture:
                context.captured[layer_of(module)] = torch.stack([key, value], dim=1)
            if context.prefix is not None:
                key, value, attention_mask = _prepend(context, module, key, value, attention_mask)
        return base(module)(module, query, key, value, attention_mask, **kwargs)

    return attend


def _prepend(
    context: AttentionContext,
    module: nn.Module,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    prefix = context.prefix
    assert prefix is not None
    stack, layer = layer_of(module)
    if attention_mask is None:
        raise UnsupportedModel(
            "the model calls attention without a mask, so a prefix cannot be made visible safely",
            seen=type(module).__name__,
        )
    kv = prefix.layers[stack][layer]  # [R, 2, H, P, D]
    context.used.add((stack, layer))
    return (
        torch.cat([kv[:, 0], key], dim=2),
        torch.cat([kv[:, 1], value], dim=2),
        context.widened(attention_mask, prefix),
    )


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
