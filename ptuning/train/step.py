"""The step machine: work is yielded, whoever drives it runs it on the backbone.

Training, validation and initialisation are generators that yield `Work` and are sent its
result. A loop over users written this way reads like a loop, and can still be run in
lock-step by ranks that share one sharded backbone (train/zero.py), where every rank must
make the same calls at the same time and one without work makes an empty one.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ptuning.attention import RowPrefix
from ptuning.backbone import Backbone, Batch
from ptuning.data.encode import IGNORE, Encoded
from ptuning.data.packing import microbatches


@dataclass(frozen=True)
class Train:
    """Add the gradient of `sum(weights * nll)` to `kv`; the result is nll `[N]`, detached.

    `kv[stack]` are leaves `[U, L, 2, H, P, D]` that require a gradient, `slots` Long `[R]`.
    """

    batch: Batch
    kv: dict[str, Tensor]
    slots: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Score:
    """The result is nll `[N]`; no gradient. Without `kv` the base model is scored."""

    batch: Batch
    kv: dict[str, Tensor] | None
    slots: Tensor


@dataclass(frozen=True)
class Capture:
    """Activations of real words: the result is `{stack: [R, L, 2, H, P, D]}`."""

    input_ids: Tensor


Work = Train | Score | Capture
Result = Tensor | dict[str, Tensor]
T = TypeVar("T")
Machine = Generator[Work, Result, T]


class Driver(Protocol):
    """Runs machines on a backbone."""

    def run(self, machine: Machine[T]) -> T: ...


class LocalDriver:
    """Runs one machine on a backbone that this process holds whole."""

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
                return self.backbone.token_nll(work.batch, prefix_of(work, self.backbone))
        nll = self.backbone.token_nll(work.batch, prefix_of(work, self.backbone))
        (work.weights * nll).sum().backward()
        return nll.detach()


def prefix_of(work: Train | Score, backbone: Backbone) -> RowPrefix | None:
    """Each row's prefix, gathered from the pack's."""
    if work.kv is None:
        return None
    return RowPrefix.of_slots(work.kv, work.slots, backbone.dtype)


def collate(rows: Sequence[Encoded], device: torch.device) -> Batch:
    """Pad rows on the right into one batch, with the positions that predict a label."""
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for r, row in enumerate(rows):
        ids[r, : len(row.input_ids)] = torch.tensor(row.input_ids)
        mask[r, : len(row.input_ids)] = 1
        labels[r, : len(row.labels)] = torch.tensor(row.labels)
    # The hidden state at t predicts the token at t + 1.
    where_r, where_t = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    batch = Batch(ids, mask, where_r, where_t, labels[where_r, where_t + 1])
    return batch.to(device)


def predicted(row: Encoded) -> int:
    """How many labels of a row have a position before them, so can be predicted."""
    return sum(label != IGNORE for label in row.labels[1:])


def score_rows(
    backbone: Backbone,
    rows: Sequence[Encoded],
    slots: Sequence[int],
    kv: dict[str, Tensor] | None,
    budget: int,
) -> Machine[list[float]]:
    """Summed nats of each row under its slot's prefix (None: the base model)."""
    sums = [0.0] * len(rows)
    for group in microbatches([len(row.input_ids) for row in rows], budget):
        batch = collate([rows[r] for r in group], backbone.device)
        if not len(batch.targets):
            continue
        picked = torch.tensor([slots[r] for r in group], device=backbone.device)
        nll = yield Score(batch, kv, picked)
        assert isinstance(nll, Tensor)
        per_row = torch.zeros(len(group), dtype=torch.float64, device=backbone.device)
        per_row.index_add_(0, batch.rows, nll.double())
        for r, nats in zip(group, per_row.tolist(), strict=True):
            sums[r] = nats
    return sums
