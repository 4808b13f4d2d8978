"""How a prefix is trained, and what a training is given and gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ptuning.data.encode import Encoded
from ptuning.train.state import TrainState
from ptuning.types import Config, EpochLoss


class TrainConfig(Config):
    SECTION: ClassVar[str] = "train"

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
    adam_beta1: float = Field(
        0.9, ge=0, lt=1, description="AdamW's decay of the mean of gradients, per step"
    )
    adam_beta2: float = Field(
        0.999, ge=0, lt=1, description="AdamW's decay of the mean of squared gradients, per step"
    )
    adam_epsilon: float = Field(
        1e-8, gt=0, description="what AdamW adds to the root of the mean of squared gradients"
    )
    patience: int | None = Field(
        2, ge=1, description="stop a user after this many epochs without a better validation loss"
    )
    min_valid_tokens: int = Field(
        64,
        ge=0,
        description="with fewer validation tokens than this a user trains all epochs and keeps the "
        "last: so few would choose an epoch by chance",
    )
    seed: int = Field(0, description="base seed; every user's own seed is made from it and the id")
    tokens_per_microbatch: int = Field(
        1024, ge=1, description="tokens of one forward pass, padding included; changes speed only"
    )
    pack_users: int = Field(
        16, ge=1, description="users that train together in one process; changes speed only"
    )
    start: Literal["init", "champion", "resume"] = Field(
        "init",
        description="where a run's trainings begin: as the method's init says; from the user's "
        "champion, where it is of the same kind (a warm start: the result depends on the user's "
        "history too); or where an earlier one with the same rows and settings but fewer epochs "
        "stopped, if it was kept (train.keep_resume)",
    )
    keep_resume: bool = Field(
        False,
        description="keep, beside each prefix, what continues its training (encoder weights, "
        "optimiser state)",
    )


# Settings that change no result beyond rounding, so no part of a training's identity.
SPEED_ONLY = frozenset({"tokens_per_microbatch", "pack_users", "keep_resume"})
# A training whose loss is no longer finite begins again, once, at this share of its rate.
RESET_SCALE, MAX_RESETS = 0.1, 1


@dataclass(frozen=True, kw_only=True)
class UserRows:
    """One user's encoded rows, without virtual tokens, and what its training starts from.

    `words` are ids whose activations or embeddings start the prefix: P for each of the
    method's members, or, with `spans`, as many for each virtual token as it is the mean of.
    `start` is a prefix to start from instead, one per member; `states` continue a training.
    """

    user_key: str
    seed: int
    train: tuple[Encoded, ...]
    valid: tuple[Encoded, ...] = ()
    test: tuple[Encoded, ...] = ()
    words: tuple[int, ...] = ()
    spans: tuple[int, ...] = ()
    start: tuple[dict[str, Tensor], ...] = ()
    states: tuple[TrainState, ...] = ()


@dataclass(kw_only=True)
class Trained:
    """A finished training: each member's best epoch, as `batch.PackPrefix` has it without
    U, fp32.

    `members` is None where the training failed; `error` says why. `resets`: how often it began
    again at a lower learning rate. `states`, one per member, continue it.
    """

    user_key: str
    members: tuple[dict[str, Tensor], ...] | None = None
    history: list[EpochLoss] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    error: str | None = None
    resets: int = 0
    states: tuple[TrainState, ...] = ()

    @property
    def kv(self) -> dict[str, Tensor] | None:
        """The first member's tensors; of all but ensembles there is no other."""
        return None if self.members is None else self.members[0]


def learning_rate_at(config: TrainConfig, peak: float, step: int, total: int) -> float:
    """The learning rate of 0-based step `step` of a user's `total` steps."""
    warmup = int(config.warmup_fraction * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    return peak * (total - step) / max(1, total - warmup)


EQUAL_LOSS = 1e-5  # nats per token; far above fp32's rounding, far below what anybody notices


class BestEpoch:
    """Early stopping as a value: feed it validation losses, it says what to do.

    An epoch is better only if its loss is lower by more than EQUAL_LOSS. Late epochs often differ
    by rounding alone, and rounding, which depends on a user's neighbours, must not choose.
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
        if self.best is None or valid < self.best - EQUAL_LOSS:
            self.best, self.since = valid, 0
            return True, False
        self.since += 1
        return False, self.patience is not None and self.since >= self.patience
