"""What continues a training: parameters, optimiser state and the place in its schedule."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ptuning.types import EpochLoss


@dataclass(kw_only=True)
class TrainState:
    """One member's training at the end of an epoch; all tensors fp32 on the CPU.

    `first` and `second` are AdamW's moments of `trained` after `updates` updates; `steps` counts
    batches, and one without labels is no update. `best` is the best epoch's prefix,
    `best_loss` its validation loss, `since` the epochs since then. `scale` is the share of the
    learning rate that is left after resets.
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
