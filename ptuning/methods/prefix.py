"""Prefix Tuning (Li and Liang 2021): trained keys and values in front of each layer's.

With `encoder_hidden_size` an MLP computes the keys and values from a trainable matrix `[P, E]`,
as in the paper; the MLP is dropped after training. Without it they are trained directly. The
default was chosen by measurement (infra/decisions.md): direct, starting from the activations of
the user's words. The paper's ablations are settings: embedding-only (`layers: embedding`), infix
(`placement: infix`) and the top layers only (`layers: K`).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from ptuning.data.layout import Layout, between, front
from ptuning.errors import MethodError
from ptuning.methods.base import (
    PEFT_PREFIX,
    PEFT_PROMPT,
    KeysAndValuesTuning,
    Parameters,
    PeftForm,
    check_embeddings,
    check_peft_embeddings,
    check_start,
)
from ptuning.methods.encoders import initial_linear, linear
from ptuning.model.batch import EMBEDDINGS, Visibility
from ptuning.model.facts import DECODER, Facts, stack_of

Stack = Literal["encoder", "decoder", "cross"]


class PrefixTuning(KeysAndValuesTuning):
    """Prefix Tuning: its settings and its implementation."""

    type: Literal["prefix"] = Field(
        "prefix", description="prefix (keys and values in front of each layer's)"
    )
    encoder_hidden_size: int | None = Field(
        None,
        ge=1,
        description="hidden size of the reparameterising MLP (512 in the paper); "
        "none: train keys and values directly",
    )
    encoder_input: Literal["embedding", "keys"] = Field(
        "embedding",
        description="width of the matrix that the MLP reads: that of the input embeddings, or of "
        "one layer's keys (as in PEFT)",
    )
    init: Literal["words", "random"] = Field(
        "words",
        description="words: start from the activations of init words (init_words of the user's "
        "rows, or method.init_text, or words of their train rows); random: start at random; with "
        "an MLP and words, its output is added to the activations and its last layer starts at 0",
    )
    layers: Literal["all", "embedding"] | Annotated[int, Field(ge=1, strict=True)] = Field(
        "all",
        description="layers with a prefix: all, the top K (the backward pass stops below them), or "
        "embedding (virtual tokens at the input only)",
    )
    placement: Literal["prefix", "infix"] = Field(
        "prefix",
        description="prefix: every token attends to the virtual tokens; infix: only the completion "
        "does and, with keys and values, the prompt's last token",
    )
    sliding_window: Literal["ignore", "respect"] = Field(
        "ignore",
        description="in layers with a sliding window: ignore (every token attends to the prefix's "
        "keys and values) or respect (only tokens within the window do, as in PEFT and in engines "
        "with a cache); virtual tokens at the input are always subject to it",
    )
    stacks: Annotated[tuple[Stack, ...], Field(min_length=1)] | None = Field(
        None,
        description="stacks of an encoder-decoder model with a prefix: encoder, decoder, cross; "
        "none: all of them",
    )

    @property
    def embedding_only(self) -> bool:
        return self.layers == "embedding"

    @property
    def layout(self) -> Layout | None:
        if not self.embedding_only:
            return None
        return (between if self.placement == "infix" else front)(self.num_virtual_tokens)

    @property
    def visibility(self) -> Visibility:
        if self.embedding_only:
            return Visibility(windowed=True)  # virtual tokens at the input are tokens like others
        return Visibility(
            infix=self.placement == "infix", windowed=self.sliding_window == "respect"
        )

    @property
    def default_learning_rate(self) -> float:
        if self.encoder_hidden_size is not None:
            return 3e-4
        return 3e-2 if self.embedding_only else 2e-2  # embeddings only: as in Prompt Tuning

    def check(self, facts: Facts) -> None:
        super().check(facts)
        if self.embedding_only:
            check_embeddings(facts)
        if facts.decoder_start_id is not None and self.placement == "infix":
            raise MethodError(
                "an encoder-decoder model reads prompt and completion separately, so there is no "
                "place for an infix",
                seen="method.placement=infix",
                expected="prefix",
                fix="omit method.placement, or use a causal backbone",
            )
        for stack in self.stacks or ():
            if stack not in facts.stacks:
                raise MethodError(
                    "the backbone has no such stack",
                    seen=f"method.stacks: {stack}",
                    expected=", ".join(facts.stacks),
                    fix="omit method.stacks to use every stack of the backbone",
                )
        fewest = min(facts.stacks[stack].layers for stack in self._stacks(facts))
        if isinstance(self.layers, int) and self.layers > fewest:
            raise MethodError(
                "more layers with a prefix than the backbone has",
                seen=f"method.layers={self.layers}",
                expected=f"1 to {fewest}, all or embedding",
                fix="set method.layers=all, or use fewer layers",
            )

    def _stacks(self, facts: Facts) -> tuple[str, ...]:
        return self.stacks or tuple(facts.stacks)

    def shapes(self, facts: Facts) -> dict[str, tuple[int, ...]]:
        if self.embedding_only:
            return {EMBEDDINGS: (self.num_virtual_tokens, facts.hidden_size)}
        depth = self.layers if isinstance(self.layers, int) else None
        return facts.kv_shapes(self.num_virtual_tokens, self._stacks(facts), depth)

    def initial(self, facts: Facts, start: dict[str, Tensor] | None, seed: int) -> Parameters:
        """See `Method.initial`. An MLP is initialised as torch's modules are; with words, its
        output is added to their activations."""
        if self.encoder_hidden_size is None:
            return super().initial(facts, start, seed)
        generator = torch.Generator().manual_seed(seed)
        check_start(self, start)
        given = {} if start is None else self.start_values(facts, start, generator)
        trained: dict[str, Tensor] = {}
        for stack, shapes in self._by_stack(facts).items():
            width, out = self._widths(facts, stack, shapes)
            mlp = {
                "embedding": torch.randn((self.num_virtual_tokens, width), generator=generator),
                **initial_linear("1", width, self.encoder_hidden_size, generator),
                **initial_linear("2", self.encoder_hidden_size, out, generator),
            }
            if given:
                mlp["w2"].zero_()
                mlp["b2"].zero_()
            trained |= {f"{stack}.{part}": mlp[part] for part in _MLP}
        return Parameters(trained, {f"start.{name}": values for name, values in given.items()})

    def _by_stack(self, facts: Facts) -> dict[str, dict[str, tuple[int, ...]]]:
        """The prefix's shapes by stack: one MLP computes all groups of a stack."""
        by_stack: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in self.shapes(facts).items():
            by_stack.setdefault(stack_of(name), {})[name] = shape
        return by_stack

    def _widths(
        self, facts: Facts, stack: str, shapes: dict[str, tuple[int, ...]]
    ) -> tuple[int, int]:
        """The MLP's input and output width per virtual token."""
        out = sum(math.prod(shape) for shape in shapes.values()) // self.num_virtual_tokens
        if self.encoder_input == "embedding" or stack == EMBEDDINGS:
            return facts.hidden_size, out
        top = facts.stacks[stack].group_of(0)
        return top.heads * top.key_width, out

    def compile(
        self, trained: dict[str, Tensor], fixed: dict[str, Tensor], facts: Facts
    ) -> dict[str, Tensor]:
        """P[i, :] = MLP(P'[i, :]) (paper, section 4.3), for U users at once."""
        if self.encoder_hidden_size is None:
            return super().compile(trained, fixed, facts)
        compiled: dict[str, Tensor] = {}
        for stack, shapes in self._by_stack(facts).items():
            mlp = {part: trained[f"{stack}.{part}"] for part in _MLP}
            flat = linear(mlp, "2", torch.tanh(linear(mlp, "1", mlp["embedding"])))  # [U, P, out]
            compiled |= {EMBEDDINGS: flat} if stack == EMBEDDINGS else _unflatten(flat, shapes)
        return {
            name: values + fixed[f"start.{name}"] if f"start.{name}" in fixed else values
            for name, values in compiled.items()
        }

    def to_peft(self, facts: Facts) -> PeftForm:
        if not self.embedding_only:
            return super().to_peft(facts)
        check_peft_embeddings(self)
        return PeftForm(PEFT_PROMPT)

    @classmethod
    def from_peft(cls, peft_type: str, num_virtual_tokens: int, facts: Facts) -> Self | None:
        """PEFT's prefix respects sliding windows, and only the decoder has one."""
        if peft_type != PEFT_PREFIX:
            return None
        stacks = None if facts.decoder_start_id is None else (DECODER,)
        return cls(num_virtual_tokens=num_virtual_tokens, sliding_window="respect", stacks=stacks)


_MLP = ("embedding", "w1", "b1", "w2", "b2")


def _unflatten(flat_UPO: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Split an MLP's output into keys and values by group, `[U, Lg, H, P, D]`. The output is
    ordered by group, then by layer, keys before values (as in PEFT)."""
    tensors, at = {}, 0
    names = list(shapes)
    for keys, values in zip(names[::2], names[1::2], strict=True):
        (layers, heads, _, key_width), value_width = shapes[keys], shapes[values][-1]
        sizes = [heads * key_width, heads * value_width]
        end = at + layers * sum(sizes)
        of_layers = flat_UPO[..., at:end].unflatten(-1, (layers, sum(sizes)))
        for name, part in zip((keys, values), of_layers.split(sizes, dim=-1), strict=True):
            tensors[name] = part.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4)
        at = end
    return tensors
