"""The state of a training: parameters, optimiser state and position in the schedule."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ptuning.types import EpochLoss


@dataclass(kw_only=True)
class TrainState:
    """The state of one member's training at the end of an epoch; all tensors fp32 on the CPU.

    `first` and `second` are AdamW's moments of `trained` after `updates` updates. `steps` counts
    batches; a batch without labels makes no update. `best` is the best epoch's prefix, `best_loss`
    its validation loss and `since` the number of epochs since then. `scale` is the factor on the
    learning rate after restarts.
    """

    trained: dict[str, Tensor]
    fixed: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    best: dict[str, Tensor]
    steps: int
    updates: int
    epoch: int
    tokens: int
    best_loss: float | None = None
    since: int = 0
    scale: float = 1.0
    resets: int = 0
    history: list[EpochLoss] = field(default_factory=list)
