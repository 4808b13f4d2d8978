"""A backbone's configuration and the facts that the rest of the library needs: stacks, sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from ptuning.types import Config

# The stacks of attention layers. A causal model has only the decoder.
DECODER, ENCODER, CROSS = "decoder", "encoder", "cross"


class BackboneConfig(Config):
    SECTION: ClassVar[str] = "backbone"

    name: str = Field(
        "smollm2",
        description="an alias (`smollm2`, `gemma3-270m`), directory, hub id or .gguf file",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype of the weights; auto: the faster one on this machine"
    )
    attention: Literal["auto", "eager", "sdpa"] = Field(
        "auto",
        description="attention kernel; auto: eager on a CPU (faster backward pass), otherwise sdpa",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, …")
    sharding: Literal["replicate", "zero3"] = Field(
        "replicate",
        description="replicate: every worker holds all weights; zero3: DeepSpeed shards them",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, slower"
    )


@dataclass(frozen=True, kw_only=True)
class GroupFacts:
    """The attention layers of a stack whose keys and values have the same shapes.

    `layers` are their numbers among the stack's attention layers, counted from the top (0 is the
    last), lowest layer first. A prefix on such a layer has keys `[H, P, Dk]` and values
    `[H, P, Dv]`, with `heads` key-value heads; Dk and Dv differ in latent attention.
    """

    layers: tuple[int, ...]
    heads: int
    key_width: int
    value_width: int

    def top(self, depth: int) -> tuple[int, ...]:
        """The group's layers that are among the stack's top `depth` layers."""
        return tuple(layer for layer in self.layers if layer < depth)


@dataclass(frozen=True, kw_only=True)
class StackFacts:
    """One stack of attention layers that takes a prefix, in groups of layers with equal shapes."""

    groups: tuple[GroupFacts, ...]

    @classmethod
    def of_one_shape(cls, *, layers: int, heads: int, head_dim: int) -> StackFacts:
        """A stack whose layers are all alike, with keys as wide as values.

        >>> StackFacts.of_one_shape(layers=2, heads=3, head_dim=64).groups[0].layers
        (1, 0)
        """
        numbers = tuple(range(layers - 1, -1, -1))
        group = GroupFacts(layers=numbers, heads=heads, key_width=head_dim, value_width=head_dim)
        return cls(groups=(group,))

    @property
    def layers(self) -> int:
        """L, the number of attention layers in the stack."""
        return sum(len(group.layers) for group in self.groups)

    def group_of(self, layer: int) -> GroupFacts:
        """The group of a layer, given the layer's number from the top."""
        return next(group for group in self.groups if layer in group.layers)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a method must know about a backbone. `hidden_size` is E, of the input embeddings.

    `decoder_start_id` begins every answer of an encoder-decoder model; None: a causal model.
    `front_stays`: whether a causal model's tokens keep attending to the leading tokens, sliding
    windows aside; with chunked attention they lose them at the end of a chunk.
    """

    stacks: dict[str, StackFacts]
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    takes_embeddings: bool = True
    decoder_start_id: int | None = None
    front_stays: bool = True

    def kv_shapes(
        self,
        num_virtual_tokens: int,
        stacks: Iterable[str] | None = None,
        depth: int | None = None,
    ) -> dict[str, tuple[int, ...]]:
        """Tensor shapes of one prefix on the top `depth` layers (None: all) of these stacks (None:
        all): `{"decoder.0.keys": (Lg, H, P, Dk), "decoder.0.values": (Lg, H, P, Dv), …}`, by group.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for stack in self.stacks if stacks is None else stacks:
            facts = self.stacks[stack]
            for name, group in enumerate(facts.groups):
                layers = group.top(facts.layers if depth is None else depth)
                if layers:
                    shape = (len(layers), group.heads, num_virtual_tokens)
                    shapes[keys_name(stack, name)] = (*shape, group.key_width)
                    shapes[values_name(stack, name)] = (*shape, group.value_width)
        return shapes

    def layers_of(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """The layers, numbered from the top, that keys and values of these shapes belong to: the
        top layers of their group. `{"decoder.0": (Lg-1, …, 0)}`; unknown names are left out."""
        return {
            f"{stack}.{name}": group.layers[-shapes[keys][0] :]
            for stack, facts in self.stacks.items()
            for name, group in enumerate(facts.groups)
            if (keys := keys_name(stack, name)) in shapes
        }

    def positions(self, prompt: int, answer: int, inside: int) -> int:
        """How many positions a prompt and its answer need, given `inside` virtual tokens in the
        decoder's attention (`tokens_inside`), which come before its real tokens. In an
        encoder-decoder model each half has its own positions."""
        if self.decoder_start_id is None:
            return inside + prompt + answer
        return max(prompt, inside + answer)


def tokens_inside(shapes: Mapping[str, Sequence[int]]) -> int:
    """P of the decoder's keys and values in a prefix of these shapes; 0 if it has none."""
    return next((shape[2] for name, shape in shapes.items() if stack_of(name) == DECODER), 0)


def keys_name(stack: str, group: int) -> str:
    """The name of a group's keys among a prefix's tensors."""
    return f"{stack}.{group}.keys"


def values_name(stack: str, group: int) -> str:
    """The name of a group's values among a prefix's tensors."""
    return f"{stack}.{group}.values"


def stack_of(name: str) -> str:
    """The stack of a tensor of keys or values, given its name."""
    return name.split(".", 1)[0]
