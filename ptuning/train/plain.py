"""The plain trainer: one user, one loop. Slow and obvious; the oracle for the packed trainer.

It uses torch's AdamW and gradient clipping, one user and one batch per step. It shares the
preparation of rows (start.py, step.py), the batch order, the schedule, early stopping and the
backbone with train/packed.py, but not the packing, the optimiser or the bookkeeping by slot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ptuning.data.encode import Encoded
from ptuning.data.packing import epoch_batches
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
from ptuning.train.start import mean_of_spans, members_of, merge_members, too_long
from ptuning.train.step import collate, predicted, real_tokens
from ptuning.types import EpochLoss, seed_of


def train_user(backbone: Backbone, method: Method, config: TrainConfig, user: UserRows) -> Trained:
    """Train one user's prefix and keep the best epoch by validation loss, or the last epoch if
    there are fewer than `config.min_valid_tokens` validation tokens."""
    method.check(backbone.facts)
    trained = []
    for member in members_of(method, backbone.template, user):
        for resets in range(MAX_RESETS + 1):
            result = _train(backbone, method, config, member, resets)
            if result.error is None:
                break
        trained.append(result)
    return merge_members(user, trained)


def _train(
    backbone: Backbone,
    method: Method,
    config: TrainConfig,
    user: UserRows,
    resets: int,
) -> Trained:
    result = Trained(
        user_key=user.user_key,
        error=too_long(user, backbone.facts, method),
        resets=resets,
    )
    if result.error is not None:
        return result
    parameters = _initial(backbone, method, user)
    trained = {name: p.unsqueeze(0).requires_grad_() for name, p in parameters.trained.items()}
    fixed = {name: p.unsqueeze(0) for name, p in parameters.fixed.items()}
    peak = (config.learning_rate or method.default_learning_rate) * RESET_SCALE**resets
    optimizer = torch.optim.AdamW(
        trained.values(),
        lr=peak,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    total = config.epochs * -(-len(user.train) // config.batch_size)
    best = BestEpoch(config.patience)

    def compiled() -> PackPrefix:
        return PackPrefix(
            method.compile(trained, fixed, backbone.facts), backbone.facts, method.visibility
        )

    for epoch in range(1, config.epochs + 1):
        nats, tokens = 0.0, 0
        for rows in epoch_batches(len(user.train), config.batch_size, seed=user.seed, epoch=epoch):
            batch = [user.train[row] for row in rows]
            seeds = [seed_of(user.seed, "dropout", result.steps, n) for n in range(len(batch))]
            dropout = Dropout(method.dropout, tuple(seeds)) if method.dropout else None
            nll = _nll(backbone, compiled(), batch, dropout)
            nats, tokens = nats + float(nll.detach().double().sum()), tokens + len(nll)
            if not math.isfinite(nats):
                result.error = f"the loss of a step is not finite, in epoch {epoch}"
                return result
            optimizer.param_groups[0]["lr"] = learning_rate_at(config, peak, result.steps, total)
            optimizer.zero_grad()
            if len(nll):
                nll.mean().backward()
            if config.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
            optimizer.step()
            result.steps += 1
            result.tokens += sum(real_tokens(row) for row in batch)
        with torch.no_grad():
            prefix = compiled()
            valid = _mean_nll(backbone, prefix, user.valid)
        finite = all(bool(p.isfinite().all()) for p in prefix.tensors.values())
        if not finite or not math.isfinite(valid or 0.0):
            result.error = f"the validation loss is not finite, in epoch {epoch}"
            return result
        result.history.append(
            EpochLoss(epoch=epoch, train=nats / tokens if tokens else None, valid=valid)
        )
        enough = sum(predicted(row) for row in user.valid) >= config.min_valid_tokens
        is_best, stop = best.see(valid if enough else None)
        if is_best:
            kept = {name: tensor[0].detach().clone() for name, tensor in prefix.tensors.items()}
            result.members = (kept,)
        if stop:
            break
    return result


def _initial(backbone: Backbone, method: Method, user: UserRows) -> Parameters:
    start = user.start[0] if user.start else None
    if user.init_ids:
        with torch.no_grad():
            captured, _ = backbone.capture(torch.tensor([user.init_ids], device=backbone.device))
        start = {name: values[0] for name, values in captured.items()}
        if method.layout is not None:
            start = mean_of_spans(start[EMBEDDINGS], user.spans)
    initial = method.initial(backbone.facts, start, user.seed)
    return Parameters(
        {name: p.to(backbone.device) for name, p in initial.trained.items()},
        {name: p.to(backbone.device) for name, p in initial.fixed.items()},
    )


def _nll(
    backbone: Backbone, prefix: PackPrefix, rows: Sequence[Encoded], dropout: Dropout | None = None
) -> Tensor:
    batch = collate(rows, backbone.device, backbone.facts.decoder_start_id)
    slots = torch.zeros(len(rows), dtype=torch.long, device=backbone.device)
    return backbone.token_nll(batch, prefix.of_rows(slots, backbone.dtype, dropout))


def _mean_nll(backbone: Backbone, prefix: PackPrefix, rows: tuple[Encoded, ...]) -> float | None:
    tokens = sum(predicted(row) for row in rows)
    if not tokens:
        return None
    nats = sum(float(_nll(backbone, prefix, [row]).double().sum()) for row in rows)
    return nats / tokens
