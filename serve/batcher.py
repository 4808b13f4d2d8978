"""Which requests run, in which slots: pure bookkeeping, without model, clock or threads.

A request is waiting, running or gone. Running requests always hold slots 0..n-1, so that a
step computes no empty row and reads the cache without a gather; the price is one copied row
where a request leaves from the middle (`Move`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ptuning.errors import ServeError


class State(Enum):
    """Where a request is. `submit`: WAITING; `admit`: RUNNING; `release`, `withdraw`: gone."""

    WAITING = "waiting"
    RUNNING = "running"


class QueueFull(ServeError):
    """No room to wait."""


@dataclass(frozen=True)
class Move:
    """The last slot's row fills the hole that a released one left."""

    source: int
    target: int


class Batcher:
    """At most `max_rows` running requests, at most `max_queue` waiting beyond free rows.

    Waiting requests are admitted in order of arrival. Those admitted together are padded to
    the longest prompt; their padded tokens stay within `prefill_tokens`, except that one
    request is admitted whatever its length.
    """

    def __init__(self, max_rows: int, max_queue: int, prefill_tokens: int) -> None:
        self.max_rows, self.max_queue, self.prefill_tokens = max_rows, max_queue, prefill_tokens
        self._waiting: dict[str, int] = {}  # id -> prompt tokens, in order of arrival
        self._rows: list[str] = []

    @property
    def rows(self) -> tuple[str, ...]:
        """Ids of the running requests; the index is the slot."""
        return tuple(self._rows)

    @property
    def waiting(self) -> tuple[str, ...]:
        return tuple(self._waiting)

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._waiting)

    def state(self, request: str) -> State | None:
        """None where the request was never submitted or is gone."""
        if request in self._waiting:
            return State.WAITING
        return State.RUNNING if request in self._rows else None

    def submit(self, request: str, prompt_tokens: int) -> None:
        """A new request waits. Raises QueueFull, or ServeError for an id that is in use."""
        if self.state(request) is not None:
            raise ServeError("a request was submitted twice", seen=request)
        if len(self._rows) + len(self._waiting) >= self.max_rows + self.max_queue:
            raise QueueFull(
                "too many requests are waiting",
                seen=f"{len(self._rows)} running, {len(self._waiting)} waiting",
                expected=f"at most {self.max_queue} waiting",
                fix="try again later",
            )
        self._waiting[request] = prompt_tokens

    def admit(self) -> tuple[str, ...]:
        """Move waiting requests into free slots, appended to `rows`; returns the newcomers."""
        admitted: list[str] = []
        longest = 0
        for request, tokens in self._waiting.items():
            longest = max(longest, tokens)
            too_long = (len(admitted) + 1) * longest > self.prefill_tokens
            if len(self._rows) + len(admitted) >= self.max_rows or (admitted and too_long):
                break
            admitted.append(request)
        for request in admitted:
            del self._waiting[request]
        self._rows.extend(admitted)
        return tuple(admitted)

    def release(self, request: str) -> Move | None:
        """A running request leaves its slot; the last row moves there unless it was the last."""
        slot = self._rows.index(request)
        last = len(self._rows) - 1
        self._rows[slot] = self._rows[last]
        self._rows.pop()
        return Move(last, slot) if slot != last else None

    def withdraw(self, request: str) -> bool:
        """A waiting request leaves; False where it does not wait (any more)."""
        return self._waiting.pop(request, None) is not None
