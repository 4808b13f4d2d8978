"""Many users in one forward and backward: the packed trainer.

All rows that the pack's users need next are sorted by length into microbatches, whoever they
belong to; each row reads its own user's keys and values, and each user's gradient, schedule,
clipping, early stop and best weights are their own. Equal to train/plain.py user by user
within rounding, whatever the neighbours; what is traded is code that reads less like the
paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptuning.backbone import Backbone
from ptuning.data.packing import epoch_batches, fill_words, microbatches
from ptuning.methods.base import Method
from ptuning.train.config import BestEpoch, TrainConfig, Trained, UserRows, learning_rate_at
from ptuning.train.slots import Slots
from ptuning.train.step import Capture, Machine, Train, collate, predicted, score_rows
from ptuning.types import EpochLoss


@dataclass
class _Progress:
    """One user's place in its own training."""

    user: UserRows
    total_steps: int
    best: BestEpoch
    result: Trained
    epoch: int = 0
    pending: list[list[int]] = field(default_factory=list)  # batches left in this epoch
    nats: float = 0.0
    tokens: int = 0
    done: bool = False

    def next_batch(self) -> list[int]:
        return self.pending.pop(0)

    def begin_epoch(self, batch_size: int) -> None:
        self.epoch, self.nats, self.tokens = self.epoch + 1, 0.0, 0
        self.pending = epoch_batches(
            len(self.user.train), batch_size, seed=self.user.seed, epoch=self.epoch
        )


def train_pack(
    backbone: Backbone,
    method: Method,
    config: TrainConfig,
    users: Sequence[UserRows],
    min_valid_tokens: int = 0,
) -> Machine[list[Trained]]:
    """Train every user of a pack; results in the order of `users`.

    A user with fewer than `min_valid_tokens` validation tokens trains all epochs and keeps
    the last: so few tokens would choose an epoch by chance.
    """
    method.check(backbone.facts)
    slots = yield from _initial_slots(backbone, method, users, config.tokens_per_microbatch)
    limit = backbone.facts.max_positions
    room = None if limit is None else limit - method.num_virtual_tokens
    progress = [_start(user, config, room) for user in users]
    peak = config.learning_rate or method.default_learning_rate
    while active := [slot for slot, one in enumerate(progress) if not one.done]:
        leaves = slots.leaves()
        yield from _one_step(backbone, config, progress, active, leaves)
        rates = [
            learning_rate_at(config, peak, progress[slot].result.steps, progress[slot].total_steps)
            for slot in active
        ]
        slots.update(leaves, active, rates, config)
        for slot in active:
            progress[slot].result.steps += 1
        ended = [slot for slot in active if not progress[slot].pending]
        if ended:
            yield from _end_epoch(backbone, config, slots, progress, ended, min_valid_tokens)
    return [_result(one, slots.best[slot]) for slot, one in enumerate(progress)]


def _start(user: UserRows, config: TrainConfig, room: int | None) -> _Progress:
    """`room` is how many real tokens the backbone's positions leave beside the prefix."""
    one = _Progress(
        user=user,
        total_steps=config.epochs * math.ceil(len(user.train) / config.batch_size),
        best=BestEpoch(config.patience),
        result=Trained(user_key=user.user_key, kv=None),
    )
    longest = max((len(row.input_ids) for row in (*user.train, *user.valid, *user.test)), default=0)
    if not user.train:
        one.result.error = "the user has no train rows"
    elif room is not None and longest > room:
        one.result.error = (
            f"a row has {longest} tokens, but the backbone has positions for {room} beside the "
            "prefix; lower data.max_length or method.num_virtual_tokens"
        )
    else:
        one.begin_epoch(config.batch_size)
    one.done = one.result.error is not None
    return one


def _initial_slots(
    backbone: Backbone, method: Method, users: Sequence[UserRows], budget: int
) -> Machine[Slots]:
    """Every user's initial parameters; activations of words are captured for many at once."""
    words: list[dict[str, Tensor] | None] = [None] * len(users)
    if method.needs_words:
        count = method.num_virtual_tokens
        # A user without rows may have no words either: such a slot is never trained.
        given = [fill_words(user.words or (0,), count) for user in users]
        for group in microbatches([count] * len(users), budget):
            ids = torch.tensor([given[slot] for slot in group], device=backbone.device)
            captured = yield Capture(ids)
            assert isinstance(captured, dict)
            for row, slot in enumerate(group):
                words[slot] = {stack: kv[row] for stack, kv in captured.items()}
    initial = [
        method.initial(backbone.facts, words[slot], user.seed) for slot, user in enumerate(users)
    ]
    return Slots(method, backbone.facts, initial, backbone.device)


def _one_step(
    backbone: Backbone,
    config: TrainConfig,
    progress: Sequence[_Progress],
    active: Sequence[int],
    leaves: dict[str, Tensor],
) -> Machine[None]:
    """Collect into `leaves` the gradient of each active user's mean loss over its next batch."""
    rows, owners, weights = [], [], []
    for slot in active:
        one = progress[slot]
        own = [one.user.train[row] for row in one.next_batch()]
        labels = sum(predicted(row) for row in own)
        rows += own
        owners += [slot] * len(own)
        weights += [1.0 / max(1, labels)] * len(own)
        one.tokens += labels
        one.result.tokens += sum(len(row.input_ids) for row in own)
    for group in microbatches([len(row.input_ids) for row in rows], config.tokens_per_microbatch):
        batch = collate([rows[r] for r in group], backbone.device)
        if not len(batch.targets):
            continue
        picked = torch.tensor([owners[r] for r in group], device=backbone.device)
        weight = torch.tensor([weights[r] for r in group], device=backbone.device)
        nll = yield Train(batch, leaves, picked, weight[batch.rows])
        assert isinstance(nll, Tensor)
        per_row = torch.zeros(len(group), dtype=torch.float64, device=backbone.device)
        per_row.index_add_(0, batch.rows, nll.double())
        for r, nats in zip(group, per_row.tolist(), strict=True):
            progress[owners[r]].nats += nats


def _end_epoch(
    backbone: Backbone,
    config: TrainConfig,
    slots: Slots,
    progress: Sequence[_Progress],
    ended: Sequence[int],
    min_valid_tokens: int,
) -> Machine[None]:
    """Validate the users whose epoch ended; keep, stop or go on, each for itself."""
    compiled = slots.compiled()
    rows = [row for slot in ended for row in progress[slot].user.valid]
    owners = [slot for slot in ended for _ in progress[slot].user.valid]
    sums = yield from score_rows(backbone, rows, owners, compiled, config.tokens_per_microbatch)
    for slot in ended:
        one = progress[slot]
        nats = [s for s, owner in zip(sums, owners, strict=True) if owner == slot]
        labels = sum(predicted(row) for row in one.user.valid)
        valid = sum(nats) / labels if labels else None
        train = one.nats / one.tokens if one.tokens else None
        one.result.history.append(EpochLoss(epoch=one.epoch, train=train, valid=valid))
        if any(loss is not None and not math.isfinite(loss) for loss in (train, valid)):
            one.result.error = f"the loss is not finite after epoch {one.epoch}: {train}, {valid}"
            one.done = True
            continue
        is_best, stop = one.best.see(valid if labels >= min_valid_tokens else None)
        if is_best:
            slots.keep_best(slot, compiled)
        one.done = stop or one.epoch == config.epochs
        if not one.done:
            one.begin_epoch(config.batch_size)


def _result(one: _Progress, best: dict[str, Tensor] | None) -> Trained:
    if best is not None and not all(bool(kv.isfinite().all()) for kv in best.values()):
        # Without validation rows nothing has scored the last step's result.
        one.result.error = one.result.error or "the trained keys and values are not finite"
    if one.result.error is None:
        one.result.kv = best
    return one.result
