"""Prompt Tuning (Lester, Al-Rfou and Constant 2021): trained embeddings before the input.

A user has just `[P, E]` values, without an encoder. Several prompts per user (`ensemble`) are
trained separately from different seeds and answer together (paper, section 6).
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from ptuning.data.layout import Layout, front
from ptuning.methods.base import (
    MAX_VIRTUAL_TOKENS,
    PEFT_PROMPT,
    Combine,
    InputTuning,
    Parameters,
    PeftForm,
    StartIds,
    check_peft_embeddings,
    check_start,
)
from ptuning.model.batch import EMBEDDINGS
from ptuning.model.facts import Facts


class PromptTuning(InputTuning):
    """Prompt Tuning: its settings and its implementation."""

    type: Literal["prompt"] = Field("prompt", description="prompt (embeddings before the input)")
    num_virtual_tokens: int = Field(
        20, ge=1, le=MAX_VIRTUAL_TOKENS, description="P, virtual tokens of a prompt (1-1000)"
    )
    init: Literal["text", "vocab", "labels", "random"] = Field(
        "text",
        description="text: start from the embeddings of init words (init_words of the user's "
        "rows, or method.init_text, or words of their train rows); vocab: of tokens drawn from the "
        "vocabulary; labels: of the user's distinct completions (class labels, each the mean of "
        "its tokens); random: from uniform random values",
    )
    ensemble: int = Field(
        1, ge=1, le=16, description="prompts per user, trained separately and answering together"
    )
    combine: Combine = Field(
        "mean",
        description="how an ensemble answers: mean: by the mean of the members' log-probabilities "
        "at each token; vote: each member answers alone and the most common answer is returned",
    )

    @property
    def start_ids(self) -> StartIds:
        sources: dict[str, StartIds] = {
            "text": "words",
            "vocab": "vocab",
            "labels": "labels",
            "random": "none",
        }
        return sources[self.init]

    @property
    def layout(self) -> Layout | None:
        return front(self.num_virtual_tokens)

    @property
    def members(self) -> int:
        return self.ensemble

    @property
    def combination(self) -> Combine:
        return self.combine

    @property
    def default_learning_rate(self) -> float:
        return 3e-2

    def initial(self, facts: Facts, start: dict[str, Tensor] | None, seed: int) -> Parameters:
        """See `Method.initial`. Random values are uniform in [-0.5, 0.5] (paper, section 3)."""
        check_start(self, start)
        if start is not None:
            return Parameters({EMBEDDINGS: start[EMBEDDINGS].detach().float().cpu().clone()})
        generator = torch.Generator().manual_seed(seed)
        shape = (self.num_virtual_tokens, facts.hidden_size)
        return Parameters({EMBEDDINGS: torch.rand(shape, generator=generator) - 0.5})

    def compile(
        self, trained: dict[str, Tensor], fixed: dict[str, Tensor], facts: Facts
    ) -> dict[str, Tensor]:
        return {EMBEDDINGS: trained[EMBEDDINGS]}

    def to_peft(self, facts: Facts) -> PeftForm:
        check_peft_embeddings(self)
        return PeftForm(PEFT_PROMPT)

    @classmethod
    def from_peft(cls, peft_type: str, num_virtual_tokens: int, facts: Facts) -> Self | None:
        if peft_type != PEFT_PROMPT:
            return None
        return cls(num_virtual_tokens=num_virtual_tokens)
