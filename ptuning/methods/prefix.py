"""Prefix Tuning (Li and Liang 2021): trained keys and values before every layer's own.

With `encoder_hidden_size` the keys and values come out of an MLP over a trainable matrix
`[P, E]`, as in the paper; the MLP is dropped after training. Without it they are trained
directly. The default was measured (infra/decisions.md): direct, from the activations of
the user's own words.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ptuning.backbone import Facts
from ptuning.errors import MethodError
from ptuning.methods.base import Parameters
from ptuning.types import Config


class PrefixTuning(Config):
    """Settings of Prefix Tuning, and the method itself."""

    type: Literal["prefix"] = Field(
        "prefix", description="tuning method: prefix (keys and values before every layer's own)"
    )
    num_virtual_tokens: int = Field(
        16, ge=1, le=200, description="P, virtual tokens of a prefix (1-200)"
    )
    encoder_hidden_size: int | None = Field(
        None,
        ge=1,
        description="hidden size of the reparameterising MLP (512 in the paper); "
        "none trains keys and values directly",
    )
    init: Literal["words", "random"] = Field(
        "words",
        description="start from the activations of real words (init_words of the user's rows, "
        "else words of their train rows) or at random; with an MLP, words are what its output "
        "is added to, and its last layer starts at zero",
    )

    @property
    def needs_words(self) -> bool:
        return self.init == "words"

    @property
    def default_learning_rate(self) -> float:
        return 3e-2 if self.encoder_hidden_size is None else 1e-3

    def check(self, facts: Facts) -> None:
        limit = facts.max_positions
        if limit is not None and self.num_virtual_tokens >= limit:
            raise MethodError(
                "more virtual tokens than the backbone has positions",
                seen=self.num_virtual_tokens,
                expected=f"fewer than {limit}",
                fix="lower method.num_virtual_tokens",
            )

    def initial(self, facts: Facts, words: dict[str, Tensor] | None, seed: int) -> Parameters:
        """See `Method.initial`. Random keys and values are normal with deviation 0.02: unit
        deviation (as torch's Embedding) starts far above the base model's loss."""
        generator = torch.Generator().manual_seed(seed)
        if self.needs_words and words is None:
            raise MethodError("init 'words' needs the activations of words")
        start = (
            {stack: kv.detach().float().cpu() for stack, kv in words.items()}
            if self.needs_words and words is not None
            else None
        )
        if self.encoder_hidden_size is None:
            if start is None:
                start = {
                    stack: 0.02
                    * torch.randn(
                        facts.kv_shape(stack, self.num_virtual_tokens), generator=generator
                    )
                    for stack in facts.stacks
                }
            return Parameters({f"kv.{stack}": kv.clone() for stack, kv in start.items()})
        return self._initial_mlp(facts, start, generator)

    def _initial_mlp(
        self, facts: Facts, start: dict[str, Tensor] | None, generator: torch.Generator
    ) -> Parameters:
        assert self.encoder_hidden_size is not None
        width, hidden = facts.hidden_size, self.encoder_hidden_size
        trained: dict[str, Tensor] = {}
        for stack in facts.stacks:
            out = math.prod(facts.kv_shape(stack, 1))
            trained |= {
                f"embedding.{stack}": torch.randn(
                    (self.num_virtual_tokens, width), generator=generator
                ),
                f"w1.{stack}": _uniform((width, hidden), width, generator),
                f"b1.{stack}": _uniform((hidden,), width, generator),
                f"w2.{stack}": _uniform((hidden, out), hidden, generator),
                f"b2.{stack}": _uniform((out,), hidden, generator),
            }
            if start is not None:
                trained[f"w2.{stack}"].zero_()
                trained[f"b2.{stack}"].zero_()
        fixed = {f"start.{stack}": kv for stack, kv in (start or {}).items()}
        return Parameters(trained, fixed)

    def compile(
        self, trained: dict[str, Tensor], fixed: dict[str, Tensor], facts: Facts
    ) -> dict[str, Tensor]:
        """P[i, :] = MLP(P'[i, :]) (paper, section 4.3), for U users at once."""
        if self.encoder_hidden_size is None:
            return {stack: trained[f"kv.{stack}"] for stack in facts.stacks}
        compiled = {}
        for stack in facts.stacks:
            layers, two, heads, length, dim = facts.kv_shape(stack, self.num_virtual_tokens)
            hidden = torch.tanh(
                torch.baddbmm(
                    trained[f"b1.{stack}"].unsqueeze(1),
                    trained[f"embedding.{stack}"],
                    trained[f"w1.{stack}"],
                )
            )
            flat = torch.baddbmm(
                trained[f"b2.{stack}"].unsqueeze(1), hidden, trained[f"w2.{stack}"]
            )  # [U, P, L*2*H*D]
            kv = flat.view(-1, length, layers, two, heads, dim).permute(0, 2, 3, 4, 1, 5)
            start = fixed.get(f"start.{stack}")
            compiled[stack] = kv if start is None else kv + start
        return compiled


def _uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    """torch.nn.Linear's own initial distribution, from a generator of the user's."""
    bound = 1.0 / math.sqrt(fan_in)
    return (2.0 * torch.rand(shape, generator=generator) - 1.0) * bound
