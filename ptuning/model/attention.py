"""The attention function through which a prefix enters the model.

Transformers calls a registered attention function in every attention layer and passes it the
keyword arguments of `model(...)`. Ours reads its layer's tensors from the call's plan
(attention_plan.py): virtual keys and values to put before the row's, and the mask over both. It
makes no decisions and keeps no state. Transformers builds no mask for it, because no mask
function is registered under its name. The trade-off: a model that does not use this interface is
refused rather than silently run without its prefix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ptuning.errors import UnsupportedModel
from ptuning.model.attention_plan import AttentionInputs, AttentionLayer, AttentionPlan

KINDS = ("eager", "sdpa")
# The keyword argument of model(...) that carries a call's plan to every layer.
PLAN = "ptuning_plan"
_LAYER = "_ptuning_layer"

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class Plan(Protocol):
    """Gives each layer its inputs: an AttentionPlan, or a wrapper that also records the reads."""

    @property
    def positions(self) -> Tensor | None: ...

    def read(self, layer: AttentionLayer, key: Tensor, value: Tensor) -> AttentionInputs:
        """The inputs of a layer; `key` and `value`, `[R, H, S, D]`, are those of the row."""
        ...


class Capture:
    """A plan that records the keys and values of every layer, and the input embeddings."""

    def __init__(self, plan: AttentionPlan) -> None:
        self._plan = plan
        self.positions = plan.positions
        self.keys_and_values: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.embedded: Tensor | None = None

    def read(self, layer: AttentionLayer, key: Tensor, value: Tensor) -> AttentionInputs:
        self.keys_and_values[layer.stack, layer.number] = (key, value)
        return self._plan.read(layer, key, value)


class EntryCheck:
    """A plan that records which layers read their inputs."""

    def __init__(self, plan: AttentionPlan) -> None:
        self._plan = plan
        self.positions = plan.positions
        self._entered: set[tuple[str, int]] = set()

    def read(self, layer: AttentionLayer, key: Tensor, value: Tensor) -> AttentionInputs:
        self._entered.add((layer.stack, layer.number))
        return self._plan.read(layer, key, value)

    def verify(self) -> None:
        """Raise UnsupportedModel unless every layer of the call read its inputs."""
        planned = {
            (stack, number)
            for stack, layers in self._plan.layers.items()
            for number in range(len(layers))
        }
        if self._entered != planned:
            raise UnsupportedModel(
                "the prefix did not enter every attention layer",
                seen=f"{len(self._entered)} layers",
                expected=f"{len(planned)} layers",
                fix="use another backbone",
            )


def mark_layer(module: nn.Module, layer: AttentionLayer) -> None:
    """Mark an attention module with its layer; its `layer_idx` is not unique across stacks."""
    setattr(module, _LAYER, layer)


def find_layer(module: nn.Module) -> AttentionLayer | None:
    """The layer that a module was marked with, or None."""
    layer: AttentionLayer | None = getattr(module, _LAYER, None)
    return layer


def _layer_of(module: nn.Module) -> AttentionLayer:
    layer = find_layer(module)
    if layer is None:
        raise UnsupportedModel(
            "an attention module was called that was not there when the backbone was loaded",
            seen=type(module).__name__,
            fix="reload the backbone",
        )
    return layer


def _with_prefix(base: Callable[[nn.Module], AttentionFunction]) -> AttentionFunction:
    def attend(
        module: nn.Module,
        query: Tensor,  # [R, heads, T, D]
        key: Tensor,  # [R, H, S, Dk]
        value: Tensor,  # [R, H, S, Dv]
        attention_mask: Tensor | None,  # from the model, which makes none
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        plan: Plan | None = kwargs.pop(PLAN, None)
        if plan is None:
            raise UnsupportedModel(
                "the model was called without an attention plan",
                seen=type(module).__name__,
                fix="call it through the backbone's methods",
            )
        inputs = plan.read(_layer_of(module), key, value)
        if inputs.keys is not None and inputs.values is not None:
            key = torch.cat([inputs.keys, key], dim=2)
            value = torch.cat([inputs.values, value], dim=2)
        if inputs.bias is not None:  # the layer's is [1, heads, T, S]
            kwargs["position_bias"] = torch.cat([inputs.bias, kwargs["position_bias"]], dim=-1)
        return base(module)(module, query, key, value, inputs.mask, **kwargs)

    return attend


def eager_of(module: nn.Module) -> AttentionFunction:
    """The eager attention from the model's source file: exact for soft caps, sinks and biases."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise UnsupportedModel(
            "the model has no eager attention function to build on",
            seen=type(module).__name__,
            fix="set backbone.attention to 'sdpa'",
        )
    return function


def sdpa_of(_module: nn.Module) -> AttentionFunction:
    """Transformers' SDPA."""
    return sdpa_attention_forward


BASES: dict[str, Callable[[nn.Module], AttentionFunction]] = {"eager": eager_of, "sdpa": sdpa_of}


def implementation(kind: str) -> str:
    """Register a kind of attention and return its name, for `attn_implementation=`."""
    if kind not in KINDS:
        raise ValueError(f"attention is one of {KINDS}, not {kind!r}")
    name = f"ptuning_{kind}"
    AttentionInterface.register(name, _with_prefix(BASES[kind]))
    return name


def read_attention_kind(model: Any) -> str:
    """The kind of attention that a model uses. Raises UnsupportedModel if it is not (or no longer)
    this library's, since a prefix would then have no effect."""
    name = str(getattr(model.config.get_text_config(), "_attn_implementation", None))
    kind = name.removeprefix("ptuning_")
    if name == kind or kind not in KINDS:
        raise UnsupportedModel(
            "the model does not use this library's attention, so a prefix cannot enter it",
            seen=f"{type(model).__name__} with attention {name!r}",
            expected=", ".join(f"ptuning_{kind}" for kind in KINDS),
            fix="load it with ptuning.load_backbone and leave its attention as it is",
        )
    return kind


def mask_dtype(kind: str, dtype: torch.dtype) -> torch.dtype:
    """Transformers' eager attention adds its mask to the scores; SDPA takes a boolean mask."""
    return dtype if kind == "eager" else torch.bool
