"""Training settings, and the inputs and results of a training."""

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
        "linear", description="linear: decay the learning rate to zero over the user's steps"
    )
    warmup_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of a user's steps used for linear warm-up"
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="clip each user's gradient to this norm; none: no clipping"
    )
    adam_beta1: float = Field(
        0.9, ge=0, lt=1, description="AdamW's beta1: decay of the running mean of gradients"
    )
    adam_beta2: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="AdamW's beta2: decay of the running mean of squared gradients",
    )
    adam_epsilon: float = Field(
        1e-8, gt=0, description="AdamW's epsilon, added to the denominator of an update"
    )
    patience: int | None = Field(
        2, ge=1, description="stop a user after so many epochs without a better validation loss"
    )
    min_valid_tokens: int = Field(
        64,
        ge=0,
        description="with fewer validation tokens than this, train all epochs and keep the last "
        "one, since the best epoch would be a matter of chance",
    )
    seed: int = Field(0, description="base seed; each user's seed is derived from it and their id")
    tokens_per_microbatch: int = Field(
        1024, ge=1, description="tokens of one forward pass, padding included; changes speed only"
    )
    pack_users: int = Field(
        16, ge=1, description="users that train together in one process; changes speed only"
    )
    start: Literal["init", "champion", "resume"] = Field(
        "init",
        description="where a run's trainings start: init: as method.init says; champion: from the "
        "user's champion, if it has the same form (a warm start: the result then depends on the "
        "user's history too); resume: where an earlier training with the same rows and settings "
        "but fewer epochs stopped, if its state was kept (train.keep_resume)",
    )
    keep_resume: bool = Field(
        False,
        description="save a resume file beside each prefix, to continue its training (encoder "
        "weights, optimiser state)",
    )


# Settings that change no result beyond rounding, so they are not part of a training's identity.
SPEED_ONLY = frozenset({"tokens_per_microbatch", "pack_users", "keep_resume"})
# A training whose loss is not finite restarts, once, at this fraction of its learning rate.
RESET_SCALE, MAX_RESETS = 0.1, 1


@dataclass(frozen=True, kw_only=True)
class UserRows:
    """One user's encoded rows, without virtual tokens, and the start of the training.

    The activations or embeddings of `init_ids` initialise the prefix: P ids for each of the
    method's members. With `spans`, virtual token i is the mean of the next `spans[i]` ids.
    `start` is a prefix to start from instead, one per member; `states` continue a training.
    """

    user_key: str
    seed: int
    train: tuple[Encoded, ...]
    valid: tuple[Encoded, ...] = ()
    test: tuple[Encoded, ...] = ()
    init_ids: tuple[int, ...] = ()
    spans: tuple[int, ...] = ()
    start: tuple[dict[str, Tensor], ...] = ()
    states: tuple[TrainState, ...] = ()


@dataclass(kw_only=True)
class Trained:
    """A finished training: the best epoch's prefix of each ensemble member, in the form of
    `batch.PackPrefix` without U, fp32.

    If the training failed, `members` is None and `error` says why. `resets` counts restarts at a
    lower learning rate. `states`, one per member, can continue the training.
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
        """The first member's tensors; only ensembles have more than one member."""
        return None if self.members is None else self.members[0]


def learning_rate_at(config: TrainConfig, peak: float, step: int, total: int) -> float:
    """The learning rate at step `step` (from 0) of a user's `total` steps."""
    warmup = int(config.warmup_fraction * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    return peak * (total - step) / max(1, total - warmup)


EQUAL_LOSS = 1e-5  # nats per token; far above fp32's rounding, far below what anybody notices


class BestEpoch:
    """Early stopping on the validation loss, without side effects.

    An epoch counts as better only if its loss is lower by more than EQUAL_LOSS. Late epochs often
    differ only by rounding, and rounding depends on a user's neighbours: it must not choose.
    If there is no validation loss (no validation rows), every epoch counts as the best so far.
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
