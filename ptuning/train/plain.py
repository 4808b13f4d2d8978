"""One user, one loop: the plain trainer. Slow, obvious, and the oracle for the packed one.

torch's own AdamW, its own gradient clipping, one batch per step, nothing shared with
train/packed.py but the batch order, the schedule's formula and the backbone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptuning.attention import RowPrefix
from ptuning.backbone import Backbone
from ptuning.data.encode import Encoded
from ptuning.data.packing import epoch_batches
from ptuning.methods.base import Method, Parameters
from ptuning.train.config import (
    BETAS,
    EPS,
    BestEpoch,
    TrainConfig,
    Trained,
    UserRows,
    learning_rate_at,
)
from ptuning.train.step import collate, predicted
from ptuning.types import EpochLoss


def train_user(
    backbone: Backbone,
    method: Method,
    config: TrainConfig,
    user: UserRows,
    min_valid_tokens: int = 0,
) -> Trained:
    """Train one user's prefix; the best epoch by validation loss is kept (the last, where there
    are fewer than `min_valid_tokens` validation tokens)."""
    parameters = _initial(backbone, method, user)
    trained = {name: p.unsqueeze(0).requires_grad_() for name, p in parameters.trained.items()}
    fixed = {name: p.unsqueeze(0) for name, p in parameters.fixed.items()}
    peak = config.learning_rate or method.default_learning_rate
    optimizer = torch.optim.AdamW(
        trained.values(), lr=peak, betas=BETAS, eps=EPS, weight_decay=config.weight_decay
    )
    total = config.epochs * -(-len(user.train) // config.batch_size)
    best, result = BestEpoch(config.patience), Trained(user_key=user.user_key, kv=None)

    for epoch in range(1, config.epochs + 1):
        nats, tokens = 0.0, 0
        for rows in epoch_batches(len(user.train), config.batch_size, seed=user.seed, epoch=epoch):
            batch = [user.train[row] for row in rows]
            kv = method.compile(trained, fixed, backbone.facts)
            nll = _nll(backbone, kv, batch)
            optimizer.param_groups[0]["lr"] = learning_rate_at(config, peak, result.steps, total)
            optimizer.zero_grad()
            if len(nll):
                nll.mean().backward()
            if config.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
            optimizer.step()
            nats, tokens = nats + float(nll.detach().double().sum()), tokens + len(nll)
            result.steps += 1
            result.tokens += sum(len(row.input_ids) for row in batch)
        with torch.no_grad():
            kv = method.compile(trained, fixed, backbone.facts)
            valid = _mean_nll(backbone, kv, user.valid)
        result.history.append(
            EpochLoss(epoch=epoch, train=nats / tokens if tokens else None, valid=valid)
        )
        enough = sum(predicted(row) for row in user.valid) >= min_valid_tokens
        is_best, stop = best.see(valid if enough else None)
        if is_best:
            result.kv = {stack: tensor[0].detach().clone() for stack, tensor in kv.items()}
        if stop:
            break
    return result


def _initial(backbone: Backbone, method: Method, user: UserRows) -> Parameters:
    method.check(backbone.facts)
    words = None
    if method.needs_words:
        with torch.no_grad():
            captured, _ = backbone.capture(torch.tensor([user.words], device=backbone.device))
        words = {stack: kv[0] for stack, kv in captured.items()}
    initial = method.initial(backbone.facts, words, user.seed)
    return Parameters(
        {name: p.to(backbone.device) for name, p in initial.trained.items()},
        {name: p.to(backbone.device) for name, p in initial.fixed.items()},
    )


def _nll(backbone: Backbone, kv: dict[str, Tensor], rows: list[Encoded]) -> Tensor:
    batch = collate(rows, backbone.device)
    slots = torch.zeros(len(rows), dtype=torch.long, device=backbone.device)
    return backbone.token_nll(batch, RowPrefix.of_slots(kv, slots, backbone.dtype))


def _mean_nll(backbone: Backbone, kv: dict[str, Tensor], rows: tuple[Encoded, ...]) -> float | None:
    tokens = sum(predicted(row) for row in rows)
    if not tokens:
        return None
    nats = sum(float(_nll(backbone, kv, [row]).double().sum()) for row in rows)
    return nats / tokens
