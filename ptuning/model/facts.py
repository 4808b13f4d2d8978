"""What the rest of the library knows of a backbone: how it is configured, and its sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from ptuning.types import Config

# The stacks of attention layers. A causal model has the decoder alone.
DECODER, ENCODER, CROSS = "decoder", "encoder", "cross"


class BackboneConfig(Config):
    name: str = Field(
        "smollm2",
        description="alias (`smollm2`, `gemma3-270m`), a directory, a hub id or a .gguf file",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="weights' dtype; auto measures which is fastest on this machine"
    )
    attention: Literal["auto", "eager", "sdpa"] = Field(
        "auto", description="attention kernel; auto is eager on a CPU (faster backward), else sdpa"
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
class StackFacts:
    """One stack of attention layers that takes a prefix: L, H and D."""

    layers: int
    heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a method must know of a backbone. `hidden_size` is E, that of its input embeddings.

    `decoder_start_id` begins every answer of an encoder-decoder model; None: a causal model.
    `front_stays` says whether a causal model's tokens go on seeing those in front, but for a
    sliding window; with attention in chunks they lose them at a chunk's end.
    """

    stacks: dict[str, StackFacts]
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    takes_embeddings: bool = True
    decoder_start_id: int | None = None
    front_stays: bool = True

    def kv_shape(
        self, stack: str, num_virtual_tokens: int, layers: int | None = None
    ) -> tuple[int, ...]:
        """`(K, 2, H, P, D)` of one prefix on a stack's top K layers (None: on all L)."""
        facts = self.stacks[stack]
        return (layers or facts.layers, 2, facts.heads, num_virtual_tokens, facts.head_dim)

    def positions(self, prompt: int, answer: int, kv: Mapping[str, Sequence[int]]) -> int:
        """How many positions a prompt and its answer take behind a prefix, whose keys and values
        have these shapes `(K, 2, H, P, D)` by stack: real tokens of the decoder come after its
        virtual ones. An encoder-decoder model has positions for each half."""
        inside = kv[DECODER][3] if DECODER in kv else 0
        if self.decoder_start_id is None:
            return inside + prompt + answer
        return max(prompt, inside + answer)
