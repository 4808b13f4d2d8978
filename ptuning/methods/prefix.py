"""Prefix Tuning (Li and Liang 2021): trained keys and values before every layer's own.

With `encoder_hidden_size` the keys and values come out of an MLP over a trainable matrix
`[P, E]`, as in the paper; the MLP is dropped after training. Without it they are trained
directly. The default was measured (infra/decisions.md): direct, from the activations of
the user's own words. The paper's ablations are settings: embedding-only (`layers:
embedding`), infix (`placement: infix`), the top layers only (`layers: K`).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ptuning.data.layout import Layout, between, front
from ptuning.errors import MethodError
from ptuning.methods.base import (
    MAX_VIRTUAL_TOKENS,
    Parameters,
    StartIds,
    Tuning,
    check_embeddings,
    check_start,
    check_virtual_tokens,
)
from ptuning.methods.encoders import initial_linear, linear
from ptuning.model.batch import EMBEDDINGS, Visibility
from ptuning.model.facts import Facts

Stack = Literal["encoder", "decoder", "cross"]


class PrefixTuning(Tuning):
    """Settings of Prefix Tuning, and the method itself."""

    type: Literal["prefix"] = Field(
        "prefix", description="prefix (keys and values before every layer's own)"
    )
    num_virtual_tokens: int = Field(
        16, ge=1, le=MAX_VIRTUAL_TOKENS, description="P, virtual tokens of a prefix (1-1000)"
    )
    encoder_hidden_size: int | None = Field(
        None,
        ge=1,
        description="hidden size of the reparameterising MLP (512 in the paper); "
        "none trains keys and values directly",
    )
    encoder_input: Literal["embedding", "keys"] = Field(
        "embedding",
        description="width of the matrix that the MLP reads: the input embedding's, or one "
        "layer's keys' (as PEFT has it)",
    )
    init: Literal["words", "random"] = Field(
        "words",
        description="start from the activations of real words (init_words of the user's rows, "
        "else method.init_text, else words of their train rows) or at random; with an MLP, words "
        "are what its output is added to, and its last layer starts at zero",
    )
    layers: Literal["all", "embedding"] | Annotated[int, Field(ge=1, strict=True)] = Field(
        "all",
        description="layers with a prefix: all, the top K (nothing below is back-propagated "
        "through), or embedding (virtual tokens at the input only)",
    )
    placement: Literal["prefix", "infix"] = Field(
        "prefix",
        description="prefix: every token sees the virtual tokens; infix: only the completion does, "
        "and, of keys and values, the prompt's last token",
    )
    visibility: Literal["always", "window"] = Field(
        "always",
        description="in layers with a sliding window: keys and values are always seen, or only "
        "within the window (as PEFT and engines with a cache compute it); virtual tokens at the "
        "input are tokens like others",
    )
    stacks: Annotated[tuple[Stack, ...], Field(min_length=1)] | None = Field(
        None,
        description="stacks with a prefix, of an encoder-decoder model: encoder, decoder, cross; "
        "none: every one it has",
    )

    @property
    def start_ids(self) -> StartIds:
        return "words" if self.init == "words" else "none"

    @property
    def embedding_only(self) -> bool:
        return self.layers == "embedding"

    @property
    def layout(self) -> Layout | None:
        if not self.embedding_only:
            return None
        return (between if self.placement == "infix" else front)(self.num_virtual_tokens)

    @property
    def seen(self) -> Visibility:
        if self.embedding_only:
            return Visibility(windowed=True)  # they are tokens like others
        return Visibility(infix=self.placement == "infix", windowed=self.visibility == "window")

    @property
    def default_learning_rate(self) -> float:
        if self.encoder_hidden_size is not None:
            return 3e-4
        return 3e-2 if self.embedding_only else 2e-2  # embeddings alone: as Prompt Tuning

    def check(self, facts: Facts) -> None:
        check_virtual_tokens(self, facts)
        if self.embedding_only:
            check_embeddings(facts)
        if facts.decoder_start_id is not None and self.placement == "infix":
            raise MethodError(
                "an infix stands between prompt and completion, which an encoder-decoder model "
                "reads apart",
                seen="method.placement=infix",
                expected="prefix",
                fix="leave method.placement out, or use a causal backbone",
            )
        for stack in self.stacks or ():
            if stack not in facts.stacks:
                raise MethodError(
                    "the backbone has no such stack",
                    seen=f"method.stacks: {stack}",
                    expected=", ".join(facts.stacks),
                    fix="leave method.stacks out to use every stack the backbone has",
                )
        fewest = min(facts.stacks[stack].layers for stack in self._stacks(facts))
        if isinstance(self.layers, int) and self.layers > fewest:
            raise MethodError(
                "more layers with a prefix than the backbone has",
                seen=f"method.layers={self.layers}",
                expected=f"1 to {fewest}, all or embedding",
                fix="set method.layers=all, or to fewer",
            )

    def _stacks(self, facts: Facts) -> tuple[str, ...]:
        return self.stacks or tuple(facts.stacks)

    def shapes(self, facts: Facts) -> dict[str, tuple[int, ...]]:
        if self.embedding_only:
            return {EMBEDDINGS: (self.num_virtual_tokens, facts.hidden_size)}
        layers = self.layers if isinstance(self.layers, int) else None
        return {
            stack: facts.kv_shape(stack, self.num_virtual_tokens, layers)
            for stack in self._stacks(facts)
        }

    def initial(self, facts: Facts, start: dict[str, Tensor] | None, seed: int) -> Parameters:
        """See `Method.initial`. Random keys and values are normal with deviation 0.02: unit
        deviation (as torch's Embedding) starts far above the base model's loss."""
        check_start(self, start)
        generator = torch.Generator().manual_seed(seed)
        shapes = self.shapes(facts)
        given = (
            None
            if start is None
            else {
                # The top K layers of what may be all L.
                name: start[name][-shape[0] :].detach().float().cpu()
                for name, shape in shapes.items()
            }
        )
        if self.encoder_hidden_size is None:
            direct = given or {
                name: 0.02 * torch.randn(shape, generator=generator)
                for name, shape in shapes.items()
            }
            return Parameters({f"kv.{name}": values.clone() for name, values in direct.items()})
        trained: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            width, out = self._widths(facts, name, shape)
            mlp = {
                "embedding": torch.randn((self.num_virtual_tokens, width), generator=generator),
                **initial_linear("1", width, self.encoder_hidden_size, generator),
                **initial_linear("2", self.encoder_hidden_size, out, generator),
            }
            if given is not None:
                mlp["w2"].zero_()
                mlp["b2"].zero_()
            trained |= {f"{key}.{name}": values for key, values in mlp.items()}
        fixed = {f"start.{name}": values for name, values in (given or {}).items()}
        return Parameters(trained, fixed)

    def _widths(self, facts: Facts, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """The MLP's input and output width per virtual token."""
        out = math.prod(shape) // self.num_virtual_tokens
        if self.encoder_input == "embedding" or name == EMBEDDINGS:
            return facts.hidden_size, out
        stack = facts.stacks[name]
        return stack.heads * stack.head_dim, out

    def compile(
        self, trained: dict[str, Tensor], fixed: dict[str, Tensor], facts: Facts
    ) -> dict[str, Tensor]:
        """P[i, :] = MLP(P'[i, :]) (paper, section 4.3), for U users at once."""
        shapes = self.shapes(facts)
        if self.encoder_hidden_size is None:
            return {name: trained[f"kv.{name}"] for name in shapes}
        compiled = {}
        for name, shape in shapes.items():
            own = {
                key.removesuffix(f".{name}"): values
                for key, values in trained.items()
                if key.endswith(f".{name}")
            }
            flat = linear(own, "2", torch.tanh(linear(own, "1", own["embedding"])))  # [U, P, out]
            if name == EMBEDDINGS:
                values = flat
            else:
                layers, two, heads, length, dim = shape
                values = flat.view(-1, length, layers, two, heads, dim).permute(0, 2, 3, 4, 1, 5)
            start = fixed.get(f"start.{name}")
            compiled[name] = values if start is None else values + start
        return compiled
