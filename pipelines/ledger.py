"""Which packs are open, leased, done, split or dead: a pure state machine.

    open --take--> leased --done--> done
      ^              |
      +---- lost ----+--death--> split (its parts are open)   where it has several users
                     +--death--> open again, then dead        where it has one

A death is blamed on the pack that the worker held. A pack of several users is cut into parts, so
that whoever killed the worker is soon alone. A user who was alone is suspected: the second try
comes last, and while nobody else of the gang works, so that it is nobody else's fault. Who dies
then, too, is dead. A holder that was only stopped with others gives its pack back without blame,
but not for ever: LOSSES of them count as a death, since a user may take a whole node down.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pipelines.plan import Pack, make_pack

PARTS = 8  # of a pack whose worker died: of 64 users three deaths find the one
TRIES = 2  # deaths of a user who is alone: the first may be a neighbour's or the machine's
LOSSES = 3  # of one pack, without anybody to blame


@dataclass(frozen=True)
class Split:
    """A pack that is cut: `parts` take its place."""

    pack: Pack
    parts: tuple[Pack, ...]


@dataclass(frozen=True)
class Death:
    """A user who killed the worker that trained them, alone, and is given up."""

    pack: Pack
    reason: str


@dataclass(frozen=True)
class Suspicion:
    """A user who was alone when the worker died, and is tried once more."""

    pack: Pack
    reason: str


Verdict = Split | Death | Suspicion


@dataclass
class _Entry:
    pack: Pack
    deaths: int = 0
    losses: int = 0

    @property
    def is_suspect(self) -> bool:
        return self.deaths > 0

    @property
    def rank(self) -> tuple[bool, int, str]:
        return self.is_suspect, -self.pack.tokens, self.pack.pack_id


class Ledger:
    """The packs of one run. `take` gives the heaviest first (Graham 1969, LPT).

    Example: `Ledger(plan.packs).take("gang-0/1")`.
    """

    def __init__(self, packs: Iterable[Pack], settled: Collection[str] = ()) -> None:
        """Without the packs that are `settled` (ids)."""
        self._entries: dict[str, _Entry] = {}  # open or leased
        self._open: list[tuple[bool, int, str]] = []  # a heap; may name packs that are not open
        self._leases: dict[str, str] = {}  # holder -> pack_id
        self._closed: set[str] = set()  # gangs that have ended
        for pack in packs:
            if pack.pack_id not in settled:
                self._add(_Entry(pack))

    @property
    def left(self) -> int:
        """Packs that are open or leased."""
        return len(self._entries)

    @property
    def open(self) -> int:
        """Packs that nobody holds."""
        return len(self._entries) - len(self._leases)

    def take(self, holder: str) -> Pack | Literal["wait"] | None:
        """Lease an open pack. None: nothing is open, or the gang has been closed. "wait": only
        suspects are open, and others of the gang are at work. Holders are named `gang/worker`.
        What the holder held before goes back without blame."""
        self._give_back(holder)
        gang = holder.split("/")[0]
        if gang in self._closed:
            return None
        at_work = [id_ for who, id_ in self._leases.items() if who.split("/")[0] == gang]
        if any(self._entries[pack_id].is_suspect for pack_id in at_work):
            return "wait"
        entry = self._next()
        if entry is None:
            return None
        if entry.is_suspect and at_work:
            return "wait"
        heapq.heappop(self._open)
        self._leases[holder] = entry.pack.pack_id
        return entry.pack

    def find(self, pack_id: str) -> Pack | None:
        """The pack, while it is open or leased."""
        entry = self._entries.get(pack_id)
        return None if entry is None else entry.pack

    def done(self, pack_id: str) -> None:
        """The pack has a record, whoever wrote it."""
        self._entries.pop(pack_id, None)
        for holder in [holder for holder, held in self._leases.items() if held == pack_id]:
            del self._leases[holder]

    def end(self, holders: Iterable[str], blamed: Mapping[str, str]) -> list[Verdict]:
        """Holders have ended: `blamed` ones died, with their reasons, the others were stopped.

        Returns the verdicts on the packs of those who died. A verdict counts once `settle` is
        called, since such a pack may turn out to be done.
        """
        verdicts = []
        for holder in sorted({*holders, *blamed}):
            entry = self._give_back(holder)
            if entry is None:
                continue
            reason = blamed.get(holder)
            if reason is None:
                entry.losses += 1
                if entry.losses < LOSSES:
                    continue
                reason = f"its worker was lost {entry.losses} times"
            verdicts.append(_judge(entry, reason))
            heapq.heappush(self._open, entry.rank)  # its rank has changed if it is a suspect now
        return verdicts

    def close(self, gang: str) -> None:
        """Give the gang nothing more: a worker of a gang that was given up may still ask."""
        self._closed.add(gang)

    def release(self, holder: str) -> None:
        """The holder has ended, through nobody's fault: its pack is open again."""
        self._give_back(holder)

    def settle(self, verdict: Verdict) -> None:
        """Carry a verdict out."""
        if isinstance(verdict, Suspicion):
            return
        self.done(verdict.pack.pack_id)
        if isinstance(verdict, Split):
            for part in verdict.parts:
                self._add(_Entry(part))

    def _add(self, entry: _Entry) -> None:
        self._entries[entry.pack.pack_id] = entry
        heapq.heappush(self._open, entry.rank)

    def _next(self) -> _Entry | None:
        """Who is next; entries of the heap that are done or leased are dropped."""
        leased = {*self._leases.values()}
        while self._open:
            rank = self._open[0]
            entry = self._entries.get(rank[-1])
            if entry is not None and rank == entry.rank and rank[-1] not in leased:
                return entry
            heapq.heappop(self._open)
        return None

    def _give_back(self, holder: str) -> _Entry | None:
        """The pack that the holder held, open again."""
        entry = self._entries.get(self._leases.pop(holder, ""))
        if entry is not None:
            heapq.heappush(self._open, entry.rank)
        return entry


def _judge(entry: _Entry, reason: str) -> Verdict:
    if len(entry.pack.users) > 1:
        return Split(entry.pack, split_pack(entry.pack))
    entry.deaths, entry.losses = entry.deaths + 1, 0
    kind = Death if entry.deaths >= TRIES else Suspicion
    return kind(entry.pack, reason)


def split_pack(pack: Pack, parts: int = PARTS) -> tuple[Pack, ...]:
    """At most `parts` packs of neighbouring users, as even as can be; always the same ones."""
    users, count = pack.users, min(parts, len(pack.users))
    cuts = [len(users) * n // count for n in range(count + 1)]
    return tuple(make_pack(users[a:b]) for a, b in pairwise(cuts))
