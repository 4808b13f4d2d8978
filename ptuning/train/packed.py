"""Many users in one forward and backward: the packed trainer.

All rows that the pack's users need next are sorted by length into microbatches, whoever they
belong to; each row reads its own user's keys and values, and each user's gradient, schedule,
clipping, early stop and best weights are their own. Equal to train/plain.py user by user
within rounding, whatever the neighbours; what is traded is code that reads less like the
paper.
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
    """One member's place in its own training."""

    user: UserRows
    total_steps: int
    best: BestEpoch
    result: Trained
    scale: float = 1.0  # of the learning rate, after resets
    epoch: int = 0
    pending: list[list[int]] = field(default_factory=list)  # batches left in this epoch
    nats: float = 0.0
    tokens: int = 0
    labels: int = 0  # of the batch in work
    done: bool = False

    def next_batch(self) -> list[int]:
        return self.pending.pop(0)

    def begin_epoch(self, batch_size: int) -> None:
        self.epoch, self.nats, self.tokens = self.epoch + 1, 0.0, 0
        self.pending = epoch_batches(
            len(self.user.train), batch_size, seed=self.user.seed, epoch=self.epoch
        )


class _Ends:
    """Tells when all members of a user are done."""

    def __init__(
        self, members: Sequence[UserRows], on_trained: Callable[[str], None] | None
    ) -> None:
        self._left = Counter(member.user_key for member in members)
        self._told: set[int] = set()
        self._on_trained = on_trained

    def still_active(self, progress: Sequence[_Progress]) -> list[int]:
        """The slots that are not done; users of whom none is left are told."""
        for slot, one in enumerate(progress):
            if one.done and slot not in self._told:
                self._told.add(slot)
                self._left[one.user.user_key] -= 1
                if not self._left[one.user.user_key] and self._on_trained is not None:
                    self._on_trained(one.user.user_key)
        return [slot for slot, one in enumerate(progress) if not one.done]


def train_pack(
    backbone: Backbone,
    method: Method,
    config: TrainConfig,
    users: Sequence[UserRows],
    on_trained: Callable[[str], None] | None = None,
) -> Machine[list[Trained]]:
    """Train every user of a pack; results in the order of `users`. `on_trained` is told each
    user's key when that user's training ends.

    A user with fewer than `config.min_valid_tokens` validation tokens trains all epochs and keeps
    the last: so few tokens would choose an epoch by chance.
    """
    method.check(backbone.facts)
    by_user = [members_of(method, backbone.template, user) for user in users]
    members = [member for own in by_user for member in own]
    ends = _Ends(members, on_trained)
    results = yield from _train_members(backbone, method, config, members, ends)
    at, trained = 0, []
    for user, own in zip(users, by_user, strict=True):
        trained.append(merge_members(user, results[at : at + len(own)]))
        at += len(own)
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
            _begin_again(slots, slot, progress[slot], config, "the loss of a step is not finite")
        active = [slot for slot in active if slot not in lost]
        # A batch in which nothing is supervised teaches nothing: its step is no update.
        taught = [slot for slot in active if progress[slot].labels]
        if taught:
            slots.update(leaves, taught, _rates(config, peak, progress, taught), config)
        for slot in active:
            progress[slot].result.steps += 1
        ended = [slot for slot in active if not progress[slot].pending]
        if ended:
            yield from _end_epoch(backbone, config, slots, progress, ended)
    return [_result(one, slots, slot, config) for slot, one in enumerate(progress)]


def _rates(
    config: TrainConfig, peak: float, progress: Sequence[_Progress], active: Sequence[int]
) -> list[float]:
    return [
        one.scale * learning_rate_at(config, peak, one.result.steps, one.total_steps)
        for one in (progress[slot] for slot in active)
    ]


def _start(user: UserRows, config: TrainConfig, error: str | None) -> _Progress:
    one = _Progress(
        user=user,
        total_steps=config.epochs * math.ceil(len(user.train) / config.batch_size),
        best=BestEpoch(config.patience),
        result=Trained(user_key=user.user_key, error=error),
    )
    one.done = one.result.error is not None
    if not one.done:
        one.begin_epoch(config.batch_size)
    return one


def _continue(one: _Progress, state: TrainState, config: TrainConfig) -> None:
    """Stand where a saved training stopped; its epochs count."""
    one.best.best, one.best.since, one.scale = state.best_loss, state.since, state.scale
    one.result.steps, one.result.tokens = state.steps, state.tokens
    one.result.resets = state.resets
    one.result.history = list(state.history)
    one.epoch = state.epoch
    stopped = config.patience is not None and state.since >= config.patience
    one.done = one.done or stopped or state.epoch >= config.epochs
    if not one.done:
        one.begin_epoch(config.batch_size)


def _begin_again(slots: Slots, slot: int, one: _Progress, config: TrainConfig, reason: str) -> None:
    """A user whose loss is not finite starts anew at a lower rate, once, however often its training
    went on; then it fails alone. One that went on starts from where it did: what was before is not
    in its state."""
    if one.result.resets >= MAX_RESETS:
        one.result.error = (
            f"{reason}, after {one.result.resets} new start at {one.scale:g} times the learning "
            f"rate, in epoch {one.epoch}; lower train.learning_rate or look at the user's rows"
        )
        one.done = True
        return
    slots.reset(slot)
    resets, scale = one.result.resets + 1, one.scale * RESET_SCALE
    one.result, one.best = Trained(user_key=one.user.user_key), BestEpoch(config.patience)
    if one.user.states:
        (state,) = one.user.states
        slots.load(slot, state)
        _continue(one, state, config)
    else:
        one.epoch = 0
        one.begin_epoch(config.batch_size)
    one.result.resets, one.scale = resets, scale  # after _continue, which reads them from the state


def _initial_slots(
    backbone: Backbone, method: Method, members: Sequence[UserRows], budget: int
) -> Machine[Slots]:
    """Every member's initial parameters; words are captured for many at once."""
    start: list[dict[str, Tensor] | None] = [
        member.start[0] if member.start else None for member in members
    ]
    if method.layout is not None:
        yield from _embed_words(backbone, members, start, budget)
    wanting = [slot for slot, member in enumerate(members) if member.words and not start[slot]]
    for group in microbatches([len(members[slot].words) for slot in wanting], budget):
        slots = [wanting[n] for n in group]
        ids = torch.tensor([members[slot].words for slot in slots], device=backbone.device)
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


def _embed_words(
    backbone: Backbone,
    members: Sequence[UserRows],
    start: list[dict[str, Tensor] | None],
    budget: int,
) -> Machine[None]:
    """Fill `start` with the embeddings of members' words: each token is a row of its own, since an
    embedding knows no neighbours, and many words need not fit a model's positions."""
    wanting = [slot for slot, member in enumerate(members) if member.words]
    tokens = [token for slot in wanting for token in members[slot].words]
    rows = []
    for at in range(0, len(tokens), budget):
        ids = torch.tensor(tokens[at : at + budget], device=backbone.device)[:, None]
        captured = yield Capture(ids)
        assert isinstance(captured, dict)
        rows.append(captured[EMBEDDINGS][:, 0])
    if not tokens:
        return
    own = torch.cat(rows).split([len(members[slot].words) for slot in wanting])
    for slot, embedded in zip(wanting, own, strict=True):
        start[slot] = mean_of_spans(embedded, members[slot].spans)


def _one_step(
    backbone: Backbone,
    method: Method,
    config: TrainConfig,
    progress: Sequence[_Progress],
    active: Sequence[int],
    leaves: PackPrefix,
) -> Machine[None]:
    """Collect into `leaves` the gradient of each active user's mean loss over its next batch."""
    rows, owners, weights, seeds = [], [], [], []
    for slot in active:
        one = progress[slot]
        own = [one.user.train[row] for row in one.next_batch()]
        labels = sum(predicted(row) for row in own)
        rows += own
        owners += [slot] * len(own)
        weights += [1.0 / max(1, labels)] * len(own)
        seeds += [(one.user.seed, "dropout", one.result.steps, n) for n in range(len(own))]
        one.tokens, one.labels = one.tokens + labels, labels
        one.result.tokens += sum(real_tokens(row) for row in own)
    for group in microbatches([len(row.input_ids) for row in rows], config.tokens_per_microbatch):
        batch = collate([rows[r] for r in group], backbone.device, backbone.facts.decoder_start_id)
        if not len(batch.targets):
            continue
        picked = torch.tensor([owners[r] for r in group], device=backbone.device)
        weight = torch.tensor([weights[r] for r in group], device=backbone.device)
        dropout = (
            Dropout(method.dropout, tuple(seed_of(*seeds[r]) for r in group))
            if method.dropout
            else None
        )
        nll = yield Train(batch, leaves, picked, weight[batch.rows], dropout)
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
        finite = all(bool(p[slot].isfinite().all()) for p in compiled.tensors.values())
        if not finite or (valid is not None and not math.isfinite(valid)):
            _begin_again(slots, slot, one, config, "the validation loss is not finite")
            continue
        one.result.history.append(EpochLoss(epoch=one.epoch, train=train, valid=valid))
        is_best, stop = one.best.see(valid if labels >= config.min_valid_tokens else None)
        if is_best:
            slots.keep_best(slot, compiled)
        one.done = stop or one.epoch == config.epochs
        if not one.done:
            one.begin_epoch(config.batch_size)


def _result(one: _Progress, slots: Slots, slot: int, config: TrainConfig) -> Trained:
    best = slots.best[slot]
    if one.result.error is None and best is not None:
        one.result.members = (best,)
        if config.keep_resume:
            one.result.states = (
                TrainState(
                    **slots.saved(slot),
                    steps=one.result.steps,
                    updates=slots.updates[slot],
                    epoch=one.epoch,
                    tokens=one.result.tokens,
                    best_loss=one.best.best,
                    since=one.best.since,
                    scale=one.scale,
                    resets=one.result.resets,
                    history=list(one.result.history),
                ),
            )
    return one.result
