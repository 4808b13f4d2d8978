"""The slots of a pack: every user's parameters and AdamW state, stacked along U.

Each slot has its own step count, learning rate, gradient norm and best weights; an update
touches the slots it names and no other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptuning.backbone import Facts
from ptuning.methods.base import Method, Parameters
from ptuning.train.config import BETAS, EPS, TrainConfig


class Slots:
    """Parameters of U users, as tensors with a leading U."""

    def __init__(
        self, method: Method, facts: Facts, users: Sequence[Parameters], device: torch.device
    ) -> None:
        self.method, self.facts = method, facts
        self.trained = _stack([user.trained for user in users], device)
        self.fixed = _stack([user.fixed for user in users], device)
        self._first = {name: torch.zeros_like(p) for name, p in self.trained.items()}
        self._second = {name: torch.zeros_like(p) for name, p in self.trained.items()}
        self.steps = [0] * len(users)
        self.best: list[dict[str, Tensor] | None] = [None] * len(users)

    def compiled(self) -> dict[str, Tensor]:
        """`{stack: [U, L, 2, H, P, D]}` without a gradient, for scoring."""
        with torch.no_grad():
            return self.method.compile(self.trained, self.fixed, self.facts)

    def leaves(self) -> dict[str, Tensor]:
        """As `compiled`, as leaves that collect a step's gradient over its microbatches."""
        return {stack: kv.detach().requires_grad_() for stack, kv in self.compiled().items()}

    def keep_best(self, slot: int, compiled: dict[str, Tensor]) -> None:
        """Remember the slot's keys and values as its best so far."""
        self.best[slot] = {stack: kv[slot].detach().clone() for stack, kv in compiled.items()}

    def update(
        self,
        leaves: dict[str, Tensor],
        slots: Sequence[int],
        rates: Sequence[float],
        config: TrainConfig,
    ) -> None:
        """One AdamW step (Loshchilov and Hutter 2019, algorithm 2) of the named slots.

        The gradient of the keys and values goes through the method once, however many
        microbatches it was collected over.
        """
        gradients = self._gradients(leaves)
        index = torch.tensor(slots, device=next(iter(self.trained.values())).device)
        for slot in slots:
            self.steps[slot] += 1
        taken = {name: g.index_select(0, index) for name, g in gradients.items()}
        if config.max_grad_norm is not None:
            _clip(taken, config.max_grad_norm)
        step = torch.tensor([float(self.steps[slot]) for slot in slots], device=index.device)
        rate = torch.tensor(list(rates), device=index.device)
        for name, gradient in taken.items():
            self._adamw(name, gradient, index, rate, step, config.weight_decay)

    def _gradients(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: p.detach().requires_grad_() for name, p in self.trained.items()}
        with torch.enable_grad():
            compiled = self.method.compile(inputs, self.fixed, self.facts)
        collected = {
            stack: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            for stack, leaf in leaves.items()
        }
        if all(compiled[stack] is inputs.get(f"kv.{stack}") for stack in compiled):
            return {f"kv.{stack}": grad for stack, grad in collected.items()}  # nothing between
        torch.autograd.backward(
            [compiled[stack] for stack in compiled], [collected[stack] for stack in compiled]
        )
        return {
            name: p.grad if p.grad is not None else torch.zeros_like(p)
            for name, p in inputs.items()
        }

    def _adamw(
        self, name: str, gradient: Tensor, index: Tensor, rate: Tensor, step: Tensor, decay: float
    ) -> None:
        shape = (-1, *([1] * (gradient.ndim - 1)))
        rate, step = rate.view(shape), step.view(shape)
        first = self._first[name].index_select(0, index).lerp_(gradient, 1 - BETAS[0])
        second = self._second[name].index_select(0, index)
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        parameter = self.trained[name].index_select(0, index).mul_(1 - rate * decay)
        denominator = (second.sqrt() / (1 - BETAS[1] ** step).sqrt()).add_(EPS)
        parameter -= rate / (1 - BETAS[0] ** step) * first / denominator
        self._first[name].index_copy_(0, index, first)
        self._second[name].index_copy_(0, index, second)
        self.trained[name].index_copy_(0, index, parameter)


def _stack(users: Sequence[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.stack([user[name] for user in users]).to(device) for name in users[0]}


def _clip(gradients: dict[str, Tensor], limit: float) -> None:
    """Scale each user's gradient, over all its parameters, to a norm of at most `limit`."""
    squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()])
    scale = (limit / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
    for gradient in gradients.values():
        gradient.mul_(scale.view(-1, *([1] * (gradient.ndim - 1))))
