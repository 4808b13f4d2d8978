"""Wait, with a deadline, for another process or thread."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(
    check: Callable[[], object], timeout_s: float = 30.0, *, every_s: float = 0.01
) -> None:
    """Return once `check()` is true. Raises AssertionError after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"still false after {timeout_s} s"
        time.sleep(every_s)
