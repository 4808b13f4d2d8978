"""How a prefix is trained, and what a training is given and gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field
from torch import Tensor

from ptuning.data.encode import Encoded
from ptuning.types import Config, EpochLoss


class TrainConfig(Config):
    epochs: int = Field(3, ge=1, description="passes over a user's train rows, at most")
    batch_size: int = Field(8, ge=1, description="rows of one user per optimiser step")
    learning_rate: float | None = Field(
        None, gt=0, description="AdamW's peak learning rate; none: the method's measured default"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    schedule: Literal["linear", "constant"] = Field(
        "linear", description="linear decays the learning rate to zero over the user's own steps"
    )
    warmup_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of a user's steps that warm up linearly"
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="clip each user's gradient to this norm; none: no clipping"
    )
    patience: int | None = Field(
        2, ge=1, description="stop a user after this many epochs without a better validation loss"
    )
    seed: int = Field(0, description="base seed; every user's own seed is made from it and the id")
    tokens_per_microbatch: int = Field(
        1024, ge=1, description="tokens of one forward pass, padding included; changes speed only"
    )
    pack_users: int = Field(
        16, ge=1, description="users that train together in one process; changes speed only"
    )


# Settings that change no result beyond rounding, so no part of a training's identity.
SPEED_ONLY = frozenset({"tokens_per_microbatch", "pack_users"})

BETAS, EPS = (0.9, 0.999), 1e-8  # AdamW's, as torch's defaults


@dataclass(frozen=True, kw_only=True)
class UserRows:
    """One user's encoded rows. `words` are P ids whose activations start the prefix."""

    user_key: str
    seed: int
    train: tuple[Encoded, ...]
    valid: tuple[Encoded, ...] = ()
    test: tuple[Encoded, ...] = ()
    words: tuple[int, ...] = ()


@dataclass(kw_only=True)
class Trained:
    """A finished training: the best epoch's keys and values `{stack: [L, 2, H, P, D]}`, fp32.

    `kv` is None where the user's loss became non-finite; `error` says so.
    """

    user_key: str
    kv: dict[str, Tensor] | None
    history: list[EpochLoss] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    error: str | None = None


def learning_rate_at(config: TrainConfig, peak: float, step: int, total: int) -> float:
    """The learning rate of 0-based step `step` of a user's `total` steps."""
    warmup = int(config.warmup_fraction * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    return peak * (total - step) / max(1, total - warmup)


class BestEpoch:
    """Early stopping as a value: feed it validation losses, it says what to do.

    Without a validation loss (no validation rows) every epoch counts as the best so far.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.best: float | None = None
        self.since = 0

    def see(self, valid: float | None) -> tuple[bool, bool]:
        """(is this the best so far, should the user stop now)."""
        if valid is None:
            return True, False
        if self.best is None or valid < self.best:
            self.best, self.since = valid, 0
            return True, False
        self.since += 1
        return False, self.patience is not None and self.since >= self.patience
