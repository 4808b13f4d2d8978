"""The ledger's desk: the one actor that hands packs to workers and knows how far they are.

Workers and the driver speak to it alone, so that nobody lists the records of a large run to
find work. What it decides about a pack is in the store before it counts: a pack's record is written
once, by the worker that did it or here, where it is split or its user is given up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.done_record import DoneRecord
from pipelines.ledger import Death, Ledger, Split, Suspicion, Verdict
from pipelines.plan import Pack
from pipelines.run_folder import RunFolder
from ptuning.store import Store
from ptuning.types import UserReport


@dataclass(frozen=True)
class Standing:
    """How far a run's training is: users and tokens trained, packs that are open, and packs that
    are open or leased. Since the last reading: `told` are the verdicts in words, `committed` the
    ids of packs that have a done-record now."""

    users: int
    tokens: int
    open: int
    left: int
    done: int = 0  # packs that workers have done since the desk was opened
    told: tuple[str, ...] = ()
    committed: tuple[str, ...] = ()


class Desk:
    """The actor. Users are counted by pack, so that one that is trained again counts once."""

    def __init__(self, store: str, run_id: str, packs: Sequence[Pack]) -> None:
        self._folder = RunFolder(Store(store), run_id)
        settled = self._folder.settled_packs()
        leaves = self._folder.unfold(packs)
        self._ledger = Ledger(leaves, settled)
        self._users: dict[str, int] = {}  # by pack
        self._trained = 0  # their sum
        for pack in leaves:
            if pack.pack_id in settled:
                self.set_users(pack.pack_id, len(pack.users))
        self._tokens = self._done = 0
        self._told: list[str] = []
        self._committed: list[str] = []

    def take(self, holder: str) -> Pack | Literal["wait"] | None:
        """See `Ledger.take`."""
        return self._ledger.take(holder)

    def done(self, pack_id: str, committed: bool = True) -> None:
        """A worker has done the pack. Its record counts if it was `committed`; if there was one
        before, that one says what becomes of the pack."""
        self._done += committed
        pack = self._ledger.find(pack_id)
        if pack is None or committed:
            self._ledger.done(pack_id)
            if committed:
                self._committed.append(pack_id)
        else:
            self._follow_record(pack)

    def end(
        self, gang: str, workers: int, blamed: Mapping[int, str], blameless: bool = False
    ) -> int:
        """A gang has ended. `blamed` are the ranks of the workers that died, with the reason;
        `blameless`: through nobody's fault, so that nothing is held against its packs. Returns how
        many packs something was learned of."""
        self._ledger.close(gang)
        holders = [f"{gang}/{rank}" for rank in range(workers)]
        if blameless:
            for holder in holders:
                self._ledger.release(holder)
            return 0
        verdicts = self._ledger.end(holders, {holders[rank]: why for rank, why in blamed.items()})
        for verdict in verdicts:
            if self._record(verdict):
                self._told.append(_describe(verdict))
                if isinstance(verdict, Death):
                    self._committed.append(verdict.pack.pack_id)
                self._ledger.settle(verdict)
            else:
                self._follow_record(verdict.pack)
        return len(verdicts)

    def _follow_record(self, pack: Pack) -> None:
        """Somebody wrote the pack's record first: its worker, before it died, or another driver's
        desk. (On an object store it may have been this desk, whose answer was lost.)"""
        leaves = self._folder.unfold([pack])
        if leaves == [pack]:
            self._ledger.done(pack.pack_id)
            self._committed.append(pack.pack_id)
            self.set_users(pack.pack_id, len(pack.users))
            return
        settled = self._folder.settled_packs()
        parts = tuple(leaf for leaf in leaves if leaf.pack_id not in settled)
        self._ledger.settle(Split(pack, parts))

    def set_users(self, pack_id: str, users: int) -> None:
        self._trained += users - self._users.get(pack_id, 0)
        self._users[pack_id] = users

    def add_tokens(self, tokens: int) -> None:
        self._tokens += tokens

    def read(self) -> Standing:
        told, self._told = tuple(self._told), []
        committed, self._committed = tuple(self._committed), []
        return Standing(
            users=self._trained,
            tokens=self._tokens,
            open=self._ledger.open,
            left=self._ledger.left,
            done=self._done,
            told=told,
            committed=committed,
        )

    def _record(self, verdict: Verdict) -> bool:
        """Write a verdict down; False if the pack has a record already."""
        pack = verdict.pack
        self.set_users(pack.pack_id, len(pack.users) if isinstance(verdict, Death) else 0)
        match verdict:
            case Split():
                return self._folder.commit_split(pack, verdict.parts)
            case Death():
                return self._folder.commit(_record_of(verdict))
        return True  # a suspicion is not kept: a resumed run tries the user twice again


def start_desk(store: str, run_id: str, packs: Sequence[Pack]) -> Any:
    """The handle of a new desk, on this node: it ends with the driver, not with a worker's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0)(Desk)
    return actor.options(scheduling_strategy=here).remote(store, run_id, packs)


class PackPost:
    """A worker's place at the desk for one pack."""

    def __init__(self, desk: Any, pack_id: str) -> None:
        self._desk, self._pack_id, self._users = desk, pack_id, 0
        self._tell()

    def add_user(self, _user_key: str) -> None:
        """A user's training ended. Keys stay here."""
        self._users += 1
        self._tell()

    def close(self, users: int) -> None:
        """The pack is done, with all its users: those, too, who failed before they trained."""
        self._users = users
        self._tell()

    def _tell(self) -> None:
        self._desk.set_users.remote(self._pack_id, self._users)


def _record_of(death: Death) -> DoneRecord:
    """A user who is given up is a failed one."""
    return DoneRecord(
        pack_id=death.pack.pack_id,
        attempt="given up",
        seconds=0.0,
        champions={user.user_key: user.champion_digest for user in death.pack.users},
        reports=tuple(
            UserReport(
                user_key=user.user_key,
                status="failed",
                stage="tune",
                error=f"the worker failed each time it trained this user alone: {death.reason}; to "
                "fix: look at the user's rows, or give workers more memory",
            )
            for user in death.pack.users
        ),
    )


def _describe(verdict: Verdict) -> str:
    if isinstance(verdict, Split):
        users, parts = len(verdict.pack.users), len(verdict.parts)
        return f"a worker failed on a pack of {users} users; it is tried again in {parts} parts"
    key = verdict.pack.users[0].user_key
    if isinstance(verdict, Suspicion):
        return f"a worker failed on user {key}, who is tried once more, alone, at the end"
    return f"user {key} is given up and counts as failed: {verdict.reason}"
