"""Forward passes over slots for encoder-decoder models, without a cache.

The encoder reads a prompt once; the decoder reads the full answer at every step. Rows have
different lengths, and a relative-position bias (T5) is shared by the batch, so answers are padded
on the right and start at column 0. The trade-off: the work grows with the square of the answer's
length, but this works for every encoder-decoder model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ptuning.model.backbone import Backbone
from ptuning.prefix.ready import Member, rows_of


@dataclass
class _Slot:
    member: Member | None = None
    encoded: Tensor | None = None  # the encoder's states of the prompt, [T, E]
    answer: list[int] = field(default_factory=list)


class AnswerRunner:
    """See serve.engine.runner.Runner; `columns` are not used here."""

    def __init__(self, backbone: Backbone, rows: int) -> None:
        self.backbone = backbone
        self._slots = [_Slot() for _ in range(rows)]

    def enter(self, slot: int, member: Member | None) -> None:
        self._slots[slot] = _Slot(member)

    def leave(self, slot: int) -> None:
        self._slots[slot] = _Slot()

    def move(self, source: int, target: int) -> None:
        self._slots[target], self._slots[source] = self._slots[source], _Slot()

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        slots = self._slots[first : first + len(prompts)]
        ids = _pad([torch.tensor(prompt) for prompt in prompts]).to(self.backbone.device)
        mask = _mask([len(prompt) for prompt in prompts]).to(self.backbone.device)
        prefix = rows_of(self.backbone, [slot.member for slot in slots])
        encoded = self.backbone.encode_source(ids, mask, prefix)
        start = self.backbone.facts.decoder_start_id
        assert start is not None
        for slot, prompt, states in zip(slots, prompts, encoded, strict=True):
            slot.encoded, slot.answer = states[: len(prompt)], [start]
        return self._step(slots)

    def decode(self, tokens: Sequence[int], columns: Sequence[int]) -> Tensor:
        slots = self._slots[: len(tokens)]
        for slot, token in zip(slots, tokens, strict=True):
            slot.answer.append(token)
        return self._step(slots)

    def _step(self, slots: Sequence[_Slot]) -> Tensor:
        device = self.backbone.device
        states = [slot.encoded for slot in slots if slot.encoded is not None]
        answers = [torch.tensor(slot.answer) for slot in slots]
        return self.backbone.answer_step(
            _pad(states),
            _mask([len(row) for row in states]).to(device),
            _pad(answers).to(device),
            rows_of(self.backbone, [slot.member for slot in slots]),
            torch.tensor([len(answer) - 1 for answer in answers], device=device),
        )


def _pad(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different lengths, padded with zeros on the right."""
    return pad_sequence(list(rows), batch_first=True)


def _mask(lengths: Sequence[int]) -> Tensor:
    """The mask of rows with these lengths, Long `[R, T]`."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
