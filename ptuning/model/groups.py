"""Convert keys and values between groups (for storage and training) and layers (for attention).

`decoder.0.keys` `[…, Lg, H, P, Dk]` holds the layers of one shape (facts.py, GroupFacts). A model
whose layers differ in shape has several groups, whose layers may alternate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ptuning.errors import WrongShape
from ptuning.model.facts import Facts, keys_name, values_name

Layers = tuple[tuple[Tensor, Tensor], ...]  # each layer's keys and values, the lowest layer first


def split_groups(tensors: Mapping[str, Tensor], facts: Facts, dim: int) -> dict[str, Layers]:
    """Split groups into `{stack: Layers}` of each stack's top layers; `dim` is the dimension Lg,
    which is removed.

    Uses `unbind` rather than a slice per layer: the backward pass of L slices would add L tensors
    of full size. Raises WrongShape if the layers are not exactly the stack's top layers.
    """
    found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for stack, stack_facts in facts.stacks.items():
        for number, group in enumerate(stack_facts.groups):
            if (name := keys_name(stack, number)) not in tensors:
                continue
            keys = tensors[name].unbind(dim)
            values = tensors[values_name(stack, number)].unbind(dim)
            layers = group.layers[len(group.layers) - len(keys) :]
            pairs = zip(layers, zip(keys, values, strict=True), strict=True)
            found.setdefault(stack, {}).update(pairs)
    for stack, layers_found in found.items():
        if set(layers_found) != set(range(len(layers_found))):
            raise WrongShape(
                "a prefix skips layers of its stack",
                seen=f"{stack}, layers from the top: {sorted(layers_found)}",
                expected=f"all of 0 to {max(layers_found)}",
                fix="give every group of the stack a prefix down to the same layer",
            )
    return {
        stack: tuple(of_layer[layer] for layer in sorted(of_layer, reverse=True))
        for stack, of_layer in found.items()
    }


def stack_groups(
    layers: Mapping[str, Sequence[tuple[Tensor, Tensor]]], facts: Facts, dim: int
) -> dict[str, Tensor]:
    """The inverse of `split_groups`, for all layers of the given stacks."""
    tensors = {}
    for stack, of_layer in layers.items():
        for number, group in enumerate(facts.stacks[stack].groups):
            pairs = [of_layer[len(of_layer) - 1 - layer] for layer in group.layers]
            tensors[keys_name(stack, number)] = torch.stack([keys for keys, _ in pairs], dim)
            tensors[values_name(stack, number)] = torch.stack([v for _, v in pairs], dim)
    return tensors
