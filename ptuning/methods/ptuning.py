"""P-Tuning (Liu et al. 2021): trained embeddings at any place of a prompt template.

A prompt encoder (a bidirectional LSTM with an MLP, or just an MLP) computes the virtual tokens'
embeddings from a trainable matrix `[P, E]` (paper, section 3.2); it is dropped after training.
Text in the template is kept as anchor tokens. The prefix file records the template.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ptuning.data.layout import Layout, front
from ptuning.errors import MethodError
from ptuning.methods.base import (
    MAX_VIRTUAL_TOKENS,
    PEFT_PTUNING,
    InputTuning,
    Parameters,
    PeftForm,
    StartIds,
    check_peft_embeddings,
    check_start,
)
from ptuning.methods.encoders import initial_linear, initial_lstm, linear, lstm
from ptuning.model.batch import EMBEDDINGS
from ptuning.model.facts import Facts


class PTuning(InputTuning):
    """P-Tuning: its settings and its implementation."""

    type: Literal["ptuning"] = Field(
        "ptuning", description="ptuning (embeddings at any place of a prompt template)"
    )
    template: str = Field(
        "{p:8}{prompt}{p:8}{completion}",
        description="placement of virtual tokens: {p:N} is N of them, {prompt} the encoded prompt "
        "(with the chat template's tokens), other text is kept (anchor tokens), and {completion} "
        "comes last",
    )
    encoder: Literal["lstm", "mlp", "none"] = Field(
        "mlp",
        description="prompt encoder: a bidirectional LSTM with an MLP, an MLP, or none (the "
        "embeddings are trained directly)",
    )
    encoder_hidden_size: int = Field(
        256, ge=1, description="hidden size of the prompt encoder (of each LSTM direction)"
    )
    encoder_num_layers: int = Field(2, ge=1, le=8, description="layers of the LSTM")
    init: Literal["words", "random"] = Field(
        "words",
        description="words: start from the embeddings of init words (as method.type=prompt does); "
        "an encoder's output, initially 0, is added to them; random: start at random",
    )

    @field_validator("template")
    @classmethod
    def _can_be_read(cls, text: str) -> str:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise MethodError(
                "method.template is not valid Unicode",
                seen=ascii(text),
                expected="text without lone surrogates",
                fix="write method.template in UTF-8",
            )
        count = Layout.parse(text).num_virtual_tokens
        if count > MAX_VIRTUAL_TOKENS:
            raise MethodError(
                "too many virtual tokens",
                seen=f"{count} in {text!r}",
                expected=f"at most {MAX_VIRTUAL_TOKENS}",
                fix="use smaller {p:N} in method.template",
            )
        return text

    @property
    def num_virtual_tokens(self) -> int:
        return self.layout.num_virtual_tokens

    @property
    def layout(self) -> Layout:
        return Layout.parse(self.template)

    @property
    def start_ids(self) -> StartIds:
        return "words" if self.init == "words" else "none"

    @property
    def default_learning_rate(self) -> float:
        return {"none": 3e-2, "mlp": 1e-2, "lstm": 3e-3}[self.encoder]

    def initial(self, facts: Facts, start: dict[str, Tensor] | None, seed: int) -> Parameters:
        """See `Method.initial`."""
        check_start(self, start)
        generator = torch.Generator().manual_seed(seed)
        count, width, hidden = self.num_virtual_tokens, facts.hidden_size, self.encoder_hidden_size
        given = None if start is None else start[EMBEDDINGS].detach().float().cpu()
        if self.encoder == "none":
            values = (
                0.02 * torch.randn((count, width), generator=generator)
                if given is None
                else given.clone()
            )
            return Parameters({EMBEDDINGS: values})
        trained = {"embedding": torch.randn((count, width), generator=generator)}
        if self.encoder == "lstm":
            trained |= initial_lstm(width, hidden, self.encoder_num_layers, generator)
            trained |= initial_linear("1", 2 * hidden, 2 * hidden, generator)
            trained |= initial_linear("2", 2 * hidden, width, generator)
            last = "2"
        else:
            trained |= initial_linear("1", width, hidden, generator)
            trained |= initial_linear("2", hidden, hidden, generator)
            trained |= initial_linear("3", hidden, width, generator)
            last = "3"
        if given is None:
            return Parameters(trained)
        trained[f"w{last}"].zero_()
        trained[f"b{last}"].zero_()
        return Parameters(trained, {"start": given})

    def compile(
        self, trained: dict[str, Tensor], fixed: dict[str, Tensor], facts: Facts
    ) -> dict[str, Tensor]:
        """h_i = MLP([LSTM_forward(h_0..i) : LSTM_backward(h_i..m)]) (paper, equation 7), or just
        the MLP."""
        if self.encoder == "none":
            return {EMBEDDINGS: trained[EMBEDDINGS]}
        x = trained["embedding"]
        if self.encoder == "lstm":
            x = lstm(trained, self.encoder_num_layers, x)
            x = linear(trained, "2", torch.relu(linear(trained, "1", x)))
        else:
            x = torch.relu(linear(trained, "1", x))
            x = linear(trained, "3", torch.relu(linear(trained, "2", x)))
        start = fixed.get("start")
        return {EMBEDDINGS: x if start is None else x + start}

    def to_peft(self, facts: Facts) -> PeftForm:
        check_peft_embeddings(self)
        settings = {
            "encoder_reparameterization_type": "LSTM" if self.encoder == "lstm" else "MLP",
            "encoder_hidden_size": self.encoder_hidden_size,
        }
        return PeftForm(PEFT_PTUNING, settings)

    @classmethod
    def from_peft(cls, peft_type: str, num_virtual_tokens: int, facts: Facts) -> Self | None:
        if peft_type != PEFT_PTUNING:
            return None
        return cls(template=front(num_virtual_tokens).text)
