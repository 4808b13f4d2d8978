"""What a tuning method is: parameters of one user, and how they become keys and values.

Nothing here knows of training loops: the plain and the packed trainer call the same two
functions, with U = 1 or U = the pack's size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ptuning.backbone import Facts


@dataclass
class Parameters:
    """One user's parameters by name; `fixed` ones take no gradient."""

    trained: dict[str, Tensor]
    fixed: dict[str, Tensor] = field(default_factory=dict)


class Method(Protocol):
    """A way to tune: Prefix Tuning today; Prompt Tuning and P-Tuning have the same shape."""

    @property
    def num_virtual_tokens(self) -> int: ...

    @property
    def needs_words(self) -> bool:
        """Whether `initial` wants the activations of real words."""
        ...

    @property
    def default_learning_rate(self) -> float: ...

    def check(self, facts: Facts) -> None:
        """Raise MethodError where the settings do not fit the backbone."""

    def initial(self, facts: Facts, words: dict[str, Tensor] | None, seed: int) -> Parameters:
        """One user's parameters before training, fp32. `words[stack]` is `[L, 2, H, P, D]`."""
        ...

    def compile(
        self, trained: dict[str, Tensor], fixed: dict[str, Tensor], facts: Facts
    ) -> dict[str, Tensor]:
        """`{stack: [U, L, 2, H, P, D]}` from parameters with a leading U; differentiable."""
        ...
