"""The packed trainer: many users in one forward and backward pass.

The next batches of all users in the pack are sorted by length into shared microbatches. Each row
reads the prefix of its user, and each user has a separate gradient, schedule, clipping, early
stopping and best epoch. Whatever users share a pack, each result equals that of train/plain.py
within rounding. The trade-off: this code reads less like the paper.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptuning.data.packing import epoch_batches, microbatches
from ptuning.methods.base import Method, Parameters
from ptuning.model.backbone import Backbone
from ptuning.model.batch import EMBEDDINGS, Dropout, PackPrefix
from ptuning.train.config import (
    MAX_RESETS,
    RESET_SCALE,
    BestEpoch,
    TrainConfig,
    Trained,
    UserRows,
    learning_rate_at,
)
from ptuning.train.slots import Slots
from ptuning.train.start import mean_of_spans, members_of, merge_members, too_long
from ptuning.train.state import TrainState
from ptuning.train.step import (
    Capture,
    Machine,
    Train,
    collate,
    predicted,
    real_tokens,
    score_rows,
)
from ptuning.types import EpochLoss, seed_of


@dataclass
class _Progress:
    """The progress of one training: a user's, or that of one member of a user's ensemble."""

    user: UserRows
    total_steps: int
    best: BestEpoch
    result: Trained
    scale: float = 1.0  # of the learning rate, after resets
    epoch: int = 0
    pending: list[list[int]] = field(default_factory=list)  # batches left in this epoch
    nats: float = 0.0
    tokens: int = 0
    labels: int = 0  # supervised tokens in the current batch
    done: bool = False

    def next_batch(self) -> list[int]:
        return self.pending.pop(0)

    def begin_epoch(self, batch_size: int) -> None:
        self.epoch, self.nats, self.tokens = self.epoch + 1, 0.0, 0
        self.pending = epoch_batches(
            len(self.user.train), batch_size, seed=self.user.seed, epoch=self.epoch
        )


class _Ends:
    """Reports a user's key once the trainings of all their members have ended."""

    def __init__(
        self, members: Sequence[UserRows], on_trained: Callable[[str], None] | None
    ) -> None:
        self._left = Counter(member.user_key for member in members)
        self._reported: set[int] = set()  # slots
        self._on_trained = on_trained

    def still_active(self, progress: Sequence[_Progress]) -> list[int]:
        """The slots whose trainings go on. Reports the users whose last one has ended."""
        for slot, training in enumerate(progress):
            if training.done and slot not in self._reported:
                self._reported.add(slot)
                user_key = training.user.user_key
                self._left[user_key] -= 1
                if not self._left[user_key] and self._on_trained is not None:
                    self._on_trained(user_key)
        return [slot for slot, training in enumerate(progress) if not training.done]


def train_pack(
    backbone: Backbone,
    method: Method,
    config: TrainConfig,
    users: Sequence[UserRows],
    on_trained: Callable[[str], None] | None = None,
) -> Machine[list[Trained]]:
    """Train every user of a pack; results in the order of `users`. `on_trained` is called
    with a user's key when that user's training ends.

    A user with fewer than `config.min_valid_tokens` validation tokens trains all epochs and keeps
    the last one: with so few tokens the best epoch would be a matter of chance.
    """
    method.check(backbone.facts)
    by_user = [members_of(method, backbone.template, user) for user in users]
    members = [member for user_members in by_user for member in user_members]
    ends = _Ends(members, on_trained)
    results = yield from _train_members(backbone, method, config, members, ends)
    at, trained = 0, []
    for user, user_members in zip(users, by_user, strict=True):
        trained.append(merge_members(user, results[at : at + len(user_members)]))
        at += len(user_members)
    return trained


def _train_members(
    backbone: Backbone,
    method: Method,
    config: TrainConfig,
    members: Sequence[UserRows],
    ends: _Ends,
) -> Machine[list[Trained]]:
    slots = yield from _initial_slots(backbone, method, members, config.tokens_per_microbatch)
    progress = [
        _start(member, config, too_long(member, backbone.facts, method)) for member in members
    ]
    for slot, member in enumerate(members):
        for state in member.states:
            slots.load(slot, state)
            _continue(progress[slot], state, config)
    peak = config.learning_rate or method.default_learning_rate
    while active := ends.still_active(progress):
        leaves = slots.leaves()
        yield from _one_step(backbone, method, config, progress, active, leaves)
        lost = [slot for slot in active if not math.isfinite(progress[slot].nats)]
        for slot in lost:
            _restart(slots, slot, progress[slot], config, "the loss of a step is not finite")
        active = [slot for slot in active if slot not in lost]
        # A batch without labels counts as a step but makes no update.
        updated = [slot for slot in active if progress[slot].labels]
        if updated:
            slots.update(leaves, updated, _rates(config, peak, progress, updated), config)
        for slot in active:
            progress[slot].result.steps += 1
        ended = [slot for slot in active if not progress[slot].pending]
        if ended:
            yield from _end_epoch(backbone, config, slots, progress, ended)
    return [_result(training, slots, slot, config) for slot, training in enumerate(progress)]


def _rates(
    config: TrainConfig, peak: float, progress: Sequence[_Progress], active: Sequence[int]
) -> list[float]:
    return [
        training.scale * learning_rate_at(config, peak, training.result.steps, training.total_steps)
        for training in (progress[slot] for slot in active)
    ]


def _start(user: UserRows, config: TrainConfig, error: str | None) -> _Progress:
    training = _Progress(
        user=user,
        total_steps=config.epochs * math.ceil(len(user.train) / config.batch_size),
        best=BestEpoch(config.patience),
        result=Trained(user_key=user.user_key, error=error),
    )
    training.done = training.result.error is not None
    if not training.done:
        training.begin_epoch(config.batch_size)
    return training


def _continue(training: _Progress, state: TrainState, config: TrainConfig) -> None:
    """Continue from a saved state; its epochs count towards `config.epochs`."""
    training.best.best, training.best.since = state.best_loss, state.since
    training.scale = state.scale
    training.result.steps, training.result.tokens = state.steps, state.tokens
    training.result.resets = state.resets
    training.result.history = list(state.history)
    training.epoch = state.epoch
    stopped = config.patience is not None and state.since >= config.patience
    training.done = training.done or stopped or state.epoch >= config.epochs
    if not training.done:
        training.begin_epoch(config.batch_size)


def _restart(
    slots: Slots, slot: int, training: _Progress, config: TrainConfig, reason: str
) -> None:
    """Restart a training whose loss is not finite, at a lower rate.

    There is one restart per training, however often it was resumed; after that the user fails. A
    resumed training restarts from its saved state, which is all that is known of it.
    """
    if training.result.resets >= MAX_RESETS:
        training.result.error = (
            f"{reason}, after {training.result.resets} restart at {training.scale:g} times the "
            f"learning rate, in epoch {training.epoch}; lower train.learning_rate or check the "
            "user's rows"
        )
        training.done = True
        return
    slots.reset(slot)
    resets, scale = training.result.resets + 1, training.scale * RESET_SCALE
    training.result = Trained(user_key=training.user.user_key)
    training.best = BestEpoch(config.patience)
    if training.user.states:
        (state,) = training.user.states
        slots.load(slot, state)
        _continue(training, state, config)
    else:
        training.epoch = 0
        training.begin_epoch(config.batch_size)
    # After _continue, which sets them from the state.
    training.result.resets, training.scale = resets, scale


def _initial_slots(
    backbone: Backbone, method: Method, members: Sequence[UserRows], budget: int
) -> Machine[Slots]:
    """Every training's initial parameters; activations of the init ids are captured in batches."""
    start: list[dict[str, Tensor] | None] = [
        member.start[0] if member.start else None for member in members
    ]
    if method.layout is not None:
        yield from _embed_init_ids(backbone, members, start, budget)
    wanting = [slot for slot, member in enumerate(members) if member.init_ids and not start[slot]]
    for group in microbatches([len(members[slot].init_ids) for slot in wanting], budget):
        slots = [wanting[n] for n in group]
        ids = torch.tensor([members[slot].init_ids for slot in slots], device=backbone.device)
        captured = yield Capture(ids)
        assert isinstance(captured, dict)
        for row, slot in enumerate(slots):
            start[slot] = {name: values[row] for name, values in captured.items()}
    initial = []
    for slot, member in enumerate(members):
        if member.states:
            initial.append(Parameters(member.states[0].trained, member.states[0].fixed))
        else:
            initial.append(method.initial(backbone.facts, start[slot], member.seed))
    return Slots(method, backbone.facts, initial, backbone.device)


def _embed_init_ids(
    backbone: Backbone,
    members: Sequence[UserRows],
    start: list[dict[str, Tensor] | None],
    budget: int,
) -> Machine[None]:
    """Fill `start` with the embeddings of the init ids. Each token is a separate row: embeddings
    do not depend on context, and the ids may exceed the model's positions."""
    wanting = [slot for slot, member in enumerate(members) if member.init_ids]
    tokens = [token for slot in wanting for token in members[slot].init_ids]
    rows = []
    for at in range(0, len(tokens), budget):
        ids = torch.tensor(tokens[at : at + budget], device=backbone.device)[:, None]
        captured = yield Capture(ids)
        assert isinstance(captured, dict)
        rows.append(captured[EMBEDDINGS][:, 0])
    if not tokens:
        return
    by_member = torch.cat(rows).split([len(members[slot].init_ids) for slot in wanting])
    for slot, embedded in zip(wanting, by_member, strict=True):
        start[slot] = mean_of_spans(embedded, members[slot].spans)


def _one_step(
    backbone: Backbone,
    method: Method,
    config: TrainConfig,
    progress: Sequence[_Progress],
    active: Sequence[int],
    leaves: PackPrefix,
) -> Machine[None]:
    """Accumulate in `leaves` the gradient of each active user's mean loss over its next batch."""
    rows, owners, weights, seeds = [], [], [], []
    for slot in active:
        training = progress[slot]
        user_batch = [training.user.train[row] for row in training.next_batch()]
        labels = sum(predicted(row) for row in user_batch)
        rows += user_batch
        owners += [slot] * len(user_batch)
        weights += [1.0 / max(1, labels)] * len(user_batch)
        step = training.result.steps
        seeds += [(training.user.seed, "dropout", step, n) for n in range(len(user_batch))]
        training.tokens, training.labels = training.tokens + labels, labels
        training.result.tokens += sum(real_tokens(row) for row in user_batch)
    for group in microbatches([len(row.input_ids) for row in rows], config.tokens_per_microbatch):
        batch = collate([rows[r] for r in group], backbone.device, backbone.facts.decoder_start_id)
        if not len(batch.targets):
            continue
        slots = torch.tensor([owners[r] for r in group], device=backbone.device)
        weight = torch.tensor([weights[r] for r in group], device=backbone.device)
        dropout = (
            Dropout(method.dropout, tuple(seed_of(*seeds[r]) for r in group))
            if method.dropout
            else None
        )
        nll = yield Train(batch, leaves, slots, weight[batch.rows], dropout)
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
) -> Machine[None]:
    """Validate the users whose epoch ended, keep the best prefix of each, and stop or continue."""
    compiled = slots.compiled()
    rows = [row for slot in ended for row in progress[slot].user.valid]
    owners = [slot for slot in ended for _ in progress[slot].user.valid]
    sums = yield from score_rows(backbone, rows, owners, compiled, config.tokens_per_microbatch)
    for slot in ended:
        training = progress[slot]
        nats = [s for s, owner in zip(sums, owners, strict=True) if owner == slot]
        labels = sum(predicted(row) for row in training.user.valid)
        valid = sum(nats) / labels if labels else None
        train = training.nats / training.tokens if training.tokens else None
        finite = all(bool(p[slot].isfinite().all()) for p in compiled.tensors.values())
        if not finite or (valid is not None and not math.isfinite(valid)):
            _restart(slots, slot, training, config, "the validation loss is not finite")
            continue
        training.result.history.append(EpochLoss(epoch=training.epoch, train=train, valid=valid))
        is_best, stop = training.best.see(valid if labels >= config.min_valid_tokens else None)
        if is_best:
            slots.keep_best(slot, compiled)
        training.done = stop or training.epoch == config.epochs
        if not training.done:
            training.begin_epoch(config.batch_size)


def _result(training: _Progress, slots: Slots, slot: int, config: TrainConfig) -> Trained:
    best = slots.best[slot]
    if training.result.error is None and best is not None:
        training.result.members = (best,)
        if config.keep_resume:
            training.result.states = (
                TrainState(
                    **slots.saved(slot),
                    steps=training.result.steps,
                    updates=slots.updates[slot],
                    epoch=training.epoch,
                    tokens=training.result.tokens,
                    best_loss=training.best.best,
                    since=training.best.since,
                    scale=training.scale,
                    resets=training.result.resets,
                    history=list(training.result.history),
                ),
            )
    return training.result
