"""Waiting with a deadline, for what another process or thread will have done."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(
    check: Callable[[], object], timeout_s: float = 30.0, *, every_s: float = 0.01
) -> None:
    """Return when `check` gives something true; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every_s)
