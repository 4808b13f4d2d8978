"""Assigns requests to slots: pure bookkeeping, without model, clock or threads.

A request is waiting, running or gone. Running requests always occupy slots 0..n-1, so a step
computes no empty row and reads the cache without a gather. The trade-off: when a request leaves
from the middle, a row is copied (`Move`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ptuning.errors import ServeError


class State(Enum):
    """A request's state: WAITING after `submit`, RUNNING after `admit`; gone after `release` or
    `withdraw`."""

    WAITING = "waiting"
    RUNNING = "running"


class QueueFull(ServeError):
    """The queue of waiting requests is full."""


@dataclass(frozen=True)
class Move:
    """Move the last slot's row to the released slot; the two are equal if the last one was
    released."""

    source: int
    target: int


class Batcher:
    """Allows `max_rows` running rows, and `max_queue` waiting requests beyond free rows.

    A request takes one row, or several (an ensemble of prefixes), which are admitted and released
    together. Waiting requests are admitted in order of arrival. Those admitted together are padded
    to the longest prompt, and their padded tokens stay within `prefill_tokens`, except that one
    request is always admitted, whatever its length.
    """

    def __init__(self, max_rows: int, max_queue: int, prefill_tokens: int) -> None:
        self.max_rows, self.max_queue, self.prefill_tokens = max_rows, max_queue, prefill_tokens
        self._waiting: dict[str, tuple[int, int]] = {}  # id -> prompt tokens, rows; by arrival
        self._rows: list[tuple[str, int]] = []  # id, index among the request's rows

    @property
    def rows(self) -> tuple[str, ...]:
        """The running request of each slot; a request with several rows has several slots."""
        return tuple(request for request, _ in self._rows)

    @property
    def slots(self) -> dict[str, list[int]]:
        """The slots of each running request's first, second, ... row, in the order of `rows`; moves
        may have mixed them."""
        slots: dict[str, list[int]] = {request: [] for request in self.rows}
        for slot in sorted(range(len(self._rows)), key=lambda slot: self._rows[slot][1]):
            slots[self._rows[slot][0]].append(slot)
        return slots

    @property
    def waiting(self) -> tuple[str, ...]:
        return tuple(self._waiting)

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._waiting)

    def state(self, request: str) -> State | None:
        """The request's state; None if it was never submitted or is gone."""
        if request in self._waiting:
            return State.WAITING
        return State.RUNNING if request in self.rows else None

    def submit(self, request: str, prompt_tokens: int, rows: int = 1) -> None:
        """Queue a new request. Raises QueueFull, or ServeError if the id is in use or the request
        can never be admitted."""
        if self.state(request) is not None:
            raise ServeError("a request was submitted twice", seen=request)
        if rows > self.max_rows:
            raise ServeError(
                "a request needs more rows than the engine has",
                seen=f"{rows} rows",
                expected=f"at most {self.max_rows}",
                fix="raise serve.max_rows",
            )
        queued = self._count_queued([*(count for _, count in self._waiting.values()), rows])
        if queued > self.max_queue:
            raise QueueFull(
                "too many requests are waiting",
                seen=f"{len(self._rows)} rows running, {queued} requests beyond free rows",
                expected=f"at most {self.max_queue} waiting",
                fix="try again later",
            )
        self._waiting[request] = (prompt_tokens, rows)

    def _count_queued(self, wanted: Sequence[int]) -> int:
        """How many requests with these numbers of rows would have to wait; none may overtake
        another."""
        free = self.max_rows - len(self._rows)
        for place, rows in enumerate(wanted):
            if rows > free:
                return len(wanted) - place
            free -= rows
        return 0

    def admit(self) -> tuple[str, ...]:
        """Move waiting requests into free slots at the end of `rows`; returns the request of each
        new slot."""
        admitted: list[str] = []
        added: list[tuple[str, int]] = []
        longest = 0
        for request, (tokens, rows) in self._waiting.items():
            longest = max(longest, tokens)
            too_long = (len(added) + rows) * longest > self.prefill_tokens
            if len(self._rows) + len(added) + rows > self.max_rows or (admitted and too_long):
                break
            admitted.append(request)
            added += [(request, place) for place in range(rows)]
        for request in admitted:
            del self._waiting[request]
        self._rows.extend(added)
        return tuple(request for request, _ in added)

    def release(self, request: str) -> tuple[Move, ...]:
        """Release a running request's slots. The moves must be done in order: each moves the last
        row to a released slot or, if `source` is `target`, only empties the slot."""
        moves = []
        for slot in reversed([n for n, row in enumerate(self.rows) if row == request]):
            last = len(self._rows) - 1
            self._rows[slot] = self._rows[last]
            self._rows.pop()
            moves.append(Move(last, slot))
        return tuple(moves)

    def withdraw(self, request: str) -> bool:
        """Remove a waiting request; returns False if it is not (or no longer) waiting."""
        return self._waiting.pop(request, None) is not None
