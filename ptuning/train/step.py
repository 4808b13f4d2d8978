"""The step machine: training code yields work, and a driver runs it on the backbone.

Training, validation and initialisation are generators that yield `Work` and are sent the result.
So a loop over users still reads like a loop, yet ranks that share a sharded backbone can run it in
lock-step (train/zero.py). There every rank must make the same calls at the same time, and a rank
without work makes an empty call.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from ptuning.data.encode import IGNORE, Encoded
from ptuning.data.packing import microbatches
from ptuning.model.batch import Batch, Dropout, PackPrefix, RowPrefix

if TYPE_CHECKING:  # it imports Transformers
    from ptuning.model.backbone import Backbone


@dataclass(frozen=True)
class Train:
    """Add the gradient of `sum(weights * nll)` to `prefix`; the result is nll `[N]`, detached.

    `prefix.tensors` are leaf tensors that require a gradient; `slots` is Long `[R]`.
    """

    batch: Batch
    prefix: PackPrefix
    slots: Tensor
    weights: Tensor
    dropout: Dropout | None = None


@dataclass(frozen=True)
class Score:
    """Score a batch: the result is nll `[N]`, without a gradient. No `prefix`: the base model.

    With `members` > 1 the batch repeats its rows for each prefix of an ensemble, member by member;
    the result is the ensemble's nll, `[N / members]`.
    """

    batch: Batch
    prefix: PackPrefix | None
    slots: Tensor
    members: int = 1


@dataclass(frozen=True)
class Capture:
    """Capture the activations of real tokens; the result is as from `Backbone.capture`."""

    input_ids: Tensor


Work = Train | Score | Capture
Result = Tensor | dict[str, Tensor]
T = TypeVar("T")
Machine = Generator[Work, Result, T]


class Driver(Protocol):
    """Runs machines on a backbone."""

    def run(self, machine: Machine[T]) -> T: ...


class LocalDriver:
    """Runs one machine on a backbone that is not sharded."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def run(self, machine: Machine[T]) -> T:
        result: Result | None = None
        while True:
            try:
                work = machine.send(result)  # type: ignore[arg-type]
            except StopIteration as stop:
                return stop.value
            result = self._execute(work)

    def _execute(self, work: Work) -> Result:
        if isinstance(work, Capture):
            with torch.no_grad():
                return self.backbone.capture(work.input_ids)[0]
        if isinstance(work, Score):
            with torch.no_grad():
                prefix = prefix_of(work, self.backbone)
                return self.backbone.token_nll(work.batch, prefix, work.members)
        nll = self.backbone.token_nll(work.batch, prefix_of(work, self.backbone))
        (work.weights * nll).sum().backward()
        return nll.detach()


def prefix_of(work: Train | Score, backbone: Backbone) -> RowPrefix | None:
    """Gather each row's prefix from those of the pack."""
    if work.prefix is None:
        return None
    dropout = work.dropout if isinstance(work, Train) else None
    return work.prefix.of_rows(work.slots, backbone.dtype, dropout)


def collate(
    rows: Sequence[Encoded], device: torch.device, decoder_start_id: int | None = None
) -> Batch:
    """Pad rows on the right into one batch, with the positions that predict a label.

    With `decoder_start_id` the prompts go to the encoder and the rest to the decoder.
    """
    if decoder_start_id is not None:
        return _collate_pairs(rows, device, decoder_start_id)
    ids, mask = _pad([row.input_ids for row in rows])
    labels, _ = _pad([row.labels for row in rows], IGNORE)
    # The hidden state at t predicts the token at t + 1.
    where_r, where_t = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    prompts = torch.tensor([row.prompt_length for row in rows])
    batch = Batch(ids, mask, prompts, where_r, where_t, labels[where_r, where_t + 1])
    return batch.to(device)


def _collate_pairs(rows: Sequence[Encoded], device: torch.device, start: int) -> Batch:
    lengths = [row.prompt_length for row in rows]
    ids, mask = _pad([row.input_ids[:at] for row, at in zip(rows, lengths, strict=True)])
    answers = [row.input_ids[at:] for row, at in zip(rows, lengths, strict=True)]
    labels, _ = _pad(
        [row.labels[at:] or [IGNORE] for row, at in zip(rows, lengths, strict=True)], IGNORE
    )
    # The decoder reads the answer shifted right: its state at t predicts the answer's token t.
    shifted, _ = _pad([[start, *answer[:-1]] for answer in answers])
    where_r, where_t = (labels != IGNORE).nonzero(as_tuple=True)
    return Batch(
        ids, mask, torch.tensor(lengths), where_r, where_t, labels[where_r, where_t], shifted
    ).to(device)


def _pad(rows: Sequence[Sequence[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Rows padded on the right, Long `[R, T]`, and their mask."""
    longest = max(len(row) for row in rows)
    padded = torch.full((len(rows), longest), value, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for r, row in enumerate(rows):
        padded[r, : len(row)] = torch.tensor(row)
        mask[r, : len(row)] = 1
    return padded, mask


def real_tokens(row: Encoded) -> int:
    """The number of real tokens in a row."""
    return sum(token >= 0 for token in row.input_ids)


def predicted(row: Encoded) -> int:
    """How many labels of a row can be predicted: all but one on the first token."""
    return sum(label != IGNORE for label in row.labels[1:])


def score_rows(
    backbone: Backbone,
    rows: Sequence[Encoded],
    slots: Sequence[int],
    prefix: PackPrefix | None,
    budget: int,
    members: int = 1,
) -> Machine[list[float]]:
    """Summed nats of each row with its slot's prefix (None: the base model), or with the ensemble
    of `members` slots that starts at its slot."""
    sums = [0.0] * len(rows)
    for group in microbatches([len(row.input_ids) for row in rows], max(1, budget // members)):
        repeated = [rows[r] for r in group] * members
        batch = collate(repeated, backbone.device, backbone.facts.decoder_start_id)
        if not len(batch.targets):
            continue
        repeated_slots = [slots[r] + member for member in range(members) for r in group]
        slots_R = torch.tensor(repeated_slots, device=backbone.device)
        nll = yield Score(batch, prefix, slots_R, members)
        assert isinstance(nll, Tensor)
        per_row = torch.zeros(len(group), dtype=torch.float64, device=backbone.device)
        per_row.index_add_(0, batch.rows[: len(nll)], nll.double())
        for r, nats in zip(group, per_row.tolist(), strict=True):
            sums[r] = nats
    return sums
