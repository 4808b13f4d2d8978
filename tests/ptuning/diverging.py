"""A training that diverges, to test what happens to it and to its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ptuning.train.slots import Slots


class DivergingTraining:
    """Makes a slot's parameters infinite after its second update, the first `times` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slot: int, times: int) -> None:
        self.slot, self.times = slot, times
        self._update = Slots.update
        monkeypatch.setattr(Slots, "update", lambda slots, *args: self.update(slots, *args))

    def update(self, slots: Slots, leaves: Any, named: Sequence[int], *rest: Any) -> None:
        self._update(slots, leaves, named, *rest)
        if self.times and self.slot in named and slots.updates[self.slot] == 2:
            self.times -= 1
            for parameter in slots.trained.values():
                parameter[self.slot] = float("inf")
