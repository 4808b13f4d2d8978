"""The slots of a pack: the parameters and AdamW state of every training, stacked along U.

Each slot has a separate step count, learning rate, gradient norm and best prefix. An update or a
reset changes only the slots it names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptuning.methods.base import Method, Parameters
from ptuning.model.batch import PackPrefix
from ptuning.model.facts import Facts
from ptuning.train.config import TrainConfig
from ptuning.train.state import TrainState


class Slots:
    """Parameters of U users, as tensors with a leading U."""

    def __init__(
        self, method: Method, facts: Facts, users: Sequence[Parameters], device: torch.device
    ) -> None:
        self.method, self.facts = method, facts
        self._initial = users
        self.trained = _stack([user.trained for user in users], device)
        self.fixed = _stack(_fill_missing([user.fixed for user in users]), device)
        self._first = {name: torch.zeros_like(p) for name, p in self.trained.items()}
        self._second = {name: torch.zeros_like(p) for name, p in self.trained.items()}
        self.updates = [0] * len(users)
        self.best: list[dict[str, Tensor] | None] = [None] * len(users)

    def compiled(self) -> PackPrefix:
        """Every slot's prefix without a gradient, for scoring."""
        with torch.no_grad():
            tensors = self.method.compile(self.trained, self.fixed, self.facts)
        return PackPrefix(tensors, self.facts, self.method.visibility)

    def leaves(self) -> PackPrefix:
        """As `compiled`, but as leaf tensors that accumulate the gradient of a step."""
        compiled = self.compiled()
        leaves = {name: p.detach().requires_grad_() for name, p in compiled.tensors.items()}
        return PackPrefix(leaves, self.facts, compiled.visibility)

    def keep_best(self, slot: int, compiled: PackPrefix) -> None:
        """Keep the slot's prefix as its best so far."""
        self.best[slot] = {name: p[slot].detach().clone() for name, p in compiled.tensors.items()}

    def reset(self, slot: int) -> None:
        """Reset the slot to its initial parameters, with an empty optimiser state."""
        for name, values in self._initial[slot].trained.items():
            self.trained[name][slot] = values.to(self.trained[name])
            self._first[name][slot] = 0
            self._second[name][slot] = 0
        self.updates[slot], self.best[slot] = 0, None

    def load(self, slot: int, state: TrainState) -> None:
        """Load a saved state into the slot."""
        for into, values in (
            (self.trained, state.trained),
            (self._first, state.first),
            (self._second, state.second),
        ):
            for name, tensor in values.items():
                into[name][slot] = tensor.to(into[name])
        self.updates[slot] = state.updates
        self.best[slot] = {name: p.to(self._device) for name, p in state.best.items()}

    def saved(self, slot: int) -> dict[str, dict[str, Tensor]]:
        """The slot's part of a TrainState: `trained`, `fixed`, `first`, `second`, `best`."""

        def of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: p[slot].detach().cpu().clone() for name, p in tensors.items()}

        best = {name: p.cpu() for name, p in (self.best[slot] or {}).items()}
        return {
            "trained": of(self.trained),
            "fixed": of({name: self.fixed[name] for name in self._initial[slot].fixed}),
            "first": of(self._first),
            "second": of(self._second),
            "best": best,
        }

    @property
    def _device(self) -> torch.device:
        return next(iter(self.trained.values())).device

    def update(
        self,
        leaves: PackPrefix,
        slots: Sequence[int],
        rates: Sequence[float],
        config: TrainConfig,
    ) -> None:
        """One AdamW step (Loshchilov and Hutter 2019, algorithm 2) of the given slots.

        The accumulated gradient of the keys and values is back-propagated through the method once,
        however many microbatches it came from.
        """
        gradients = self._gradients(leaves)
        index = torch.tensor(slots, device=self._device)
        for slot in slots:
            self.updates[slot] += 1
        taken = {name: g.index_select(0, index) for name, g in gradients.items()}
        if config.max_grad_norm is not None:
            _clip(taken, config.max_grad_norm)
        step = torch.tensor([float(self.updates[slot]) for slot in slots], device=index.device)
        rate = torch.tensor(list(rates), device=index.device)
        for name, gradient in taken.items():
            self._adamw(name, gradient, index, rate, step, config)

    def _gradients(self, leaves: PackPrefix) -> dict[str, Tensor]:
        inputs = {name: p.detach().requires_grad_() for name, p in self.trained.items()}
        with torch.enable_grad():
            compiled = self.method.compile(inputs, self.fixed, self.facts)
        collected = {
            name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            for name, leaf in leaves.tensors.items()
        }
        torch.autograd.backward(
            [compiled[name] for name in compiled], [collected[name] for name in compiled]
        )
        return {
            name: p.grad if p.grad is not None else torch.zeros_like(p)
            for name, p in inputs.items()
        }

    def _adamw(
        self,
        name: str,
        gradient: Tensor,
        index: Tensor,
        rate: Tensor,
        step: Tensor,
        config: TrainConfig,
    ) -> None:
        beta1, beta2 = config.adam_beta1, config.adam_beta2
        shape = (-1, *([1] * (gradient.ndim - 1)))
        rate, step = rate.view(shape), step.view(shape)
        first = self._first[name].index_select(0, index).lerp_(gradient, 1 - beta1)
        second = self._second[name].index_select(0, index)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        parameter = self.trained[name].index_select(0, index).mul_(1 - rate * config.weight_decay)
        denominator = (second.sqrt() / (1 - beta2**step).sqrt()).add_(config.adam_epsilon)
        parameter -= rate / (1 - beta1**step) * first / denominator
        self._first[name].index_copy_(0, index, first)
        self._second[name].index_copy_(0, index, second)
        self.trained[name].index_copy_(0, index, parameter)


def _stack(users: Sequence[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.stack([user[name] for user in users]).to(device) for name in users[0]}


def _fill_missing(users: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Give every user the same names; a missing tensor (a fixed start to add) becomes zeros."""
    zeros = {name: torch.zeros_like(like) for user in users for name, like in user.items()}
    return [zeros | user for user in users]


def _clip(gradients: dict[str, Tensor], limit: float) -> None:
    """Scale each user's gradient, over all its parameters, to a norm of at most `limit`."""
    squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()])
    scale = (limit / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
    for gradient in gradients.values():
        gradient.mul_(scale.view(-1, *([1] * (gradient.ndim - 1))))
