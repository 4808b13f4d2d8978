"""Whatever dies, every user ends in exactly one pack that is done, or is given up."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from packs import pack_of

from pipelines.ledger import (
    LOSSES,
    PARTS,
    TRIES,
    Death,
    Ledger,
    Split,
    Suspicion,
    split_pack,
)
from pipelines.plan import Pack

packs = st.lists(st.integers(1, 20), max_size=6).map(
    lambda sizes: [
        pack_of(*(f"{number}-{n}" for n in range(size)), tokens=1 + size % 3)
        for number, size in enumerate(sizes)
    ]
)


class World:
    """Simulated gangs whose workers take packs. A worker with a poisonous user in its pack dies,
    and its gang ends."""

    def __init__(
        self,
        made: list[Pack],
        poison: set[str],
        gangs: int,
        workers: int,
        blame_all: bool = False,
    ) -> None:
        self.blame_all = blame_all  # as when sharded workers end together
        self.ledger, self.poison = Ledger(made), poison
        self.held: dict[str, Pack] = {}
        self.holders = [f"gang-{g}/{w}" for g in range(gangs) for w in range(workers)]
        self.done: Counter[str] = Counter()
        self.dead: Counter[str] = Counter()
        self.deaths = 0

    def step(self, holder: str) -> None:
        """A worker's next step: take a pack, or finish its pack."""
        pack = self.held.pop(holder, None)
        if pack is None:
            taken = self.ledger.take(holder)
            if isinstance(taken, Pack):
                self.held[holder] = taken
        elif any(user.user_key in self.poison for user in pack.users):
            self.deaths += 1
            self._end(holder, {holder: "killed"})
        else:
            self.ledger.done(pack.pack_id)
            self.done.update(user.user_key for user in pack.users)

    def lose(self, holder: str) -> None:
        """The holder's gang ends, and no worker is blamed."""
        self._end(holder, {})

    def _end(self, holder: str, blamed: dict[str, str]) -> None:
        gang = holder.split("/")[0]
        ended = [other for other in self.holders if other.split("/")[0] == gang]
        if self.blame_all and blamed:
            blamed = dict.fromkeys(ended, "killed")
        for other in ended:
            self.held.pop(other, None)
        for verdict in self.ledger.end(ended, blamed):
            self.ledger.settle(verdict)
            if isinstance(verdict, Death):
                self.dead.update(user.user_key for user in verdict.pack.users)

    def finish(self) -> None:
        for _ in range(10_000):
            if not self.ledger.left:
                return
            for holder in self.holders:
                self.step(holder)
        raise AssertionError("the ledger never becomes empty")


@given(packs, st.sets(st.integers(0, 60), max_size=4), st.integers(1, 3), st.integers(1, 3),
       st.booleans(), st.lists(st.integers(0, 8), max_size=60))  # fmt: skip
def test_every_user_is_done_once_and_only_users_who_kill_workers_are_given_up(
    made: list[Pack], picks: set[int], gangs: int, workers: int, blame_all: bool, order: list[int]
) -> None:
    users = [user.user_key for pack in made for user in pack.users]
    poison = {users[pick % len(users)] for pick in picks} if users else set()
    world = World(made, poison, gangs, workers, blame_all)
    for number in order:
        world.step(world.holders[number % len(world.holders)])
    world.finish()
    assert world.dead == Counter(poison)
    assert world.done == Counter(set(users) - poison)
    most = 1 + 2 + TRIES  # of 20 users: the whole pack, a part of it, then alone
    assert world.deaths <= most * max(1, len(poison))


@given(packs, st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60))
def test_lost_gangs_without_blame_give_no_user_up_until_there_are_many(
    made: list[Pack], events: list[tuple[int, bool]]
) -> None:
    world = World(made, set(), 2, 2)
    losses: Counter[str] = Counter()
    for number, lost in events:
        holder = world.holders[number]
        gang = holder.split("/")[0]
        held = [p.pack_id for h, p in world.held.items() if h.startswith(gang)]
        if lost and all(losses[pack_id] < LOSSES - 1 for pack_id in held):
            losses.update(held)
            world.lose(holder)
        else:
            world.step(holder)
    world.finish()
    assert not world.dead
    assert world.done == Counter(user.user_key for pack in made for user in pack.users)


def test_the_heaviest_pack_is_taken_first() -> None:
    made = [pack_of("a", tokens=2), pack_of("b", tokens=9), pack_of("c", tokens=5)]
    ledger = Ledger(made)
    taken = [ledger.take(f"gang-0/{n}") for n in range(4)]
    assert [pack.tokens if isinstance(pack, Pack) else pack for pack in taken] == [9, 5, 2, None]
    assert (ledger.open, ledger.left) == (0, 3)


def test_a_suspect_is_tried_last_and_while_nobody_else_of_the_gang_works() -> None:
    suspect, other, third = pack_of("s", tokens=9), pack_of("o", tokens=2), pack_of("t")
    ledger = Ledger([suspect, other, third])
    assert ledger.take("gang-0/0") == suspect
    assert ledger.end(["gang-0/0"], {"gang-0/0": "killed"}) == [Suspicion(suspect, "killed")]
    assert ledger.take("gang-0/0") == other
    assert ledger.take("gang-0/1") == third
    ledger.done(third.pack_id)
    assert ledger.take("gang-0/1") == "wait"
    ledger.done(other.pack_id)
    assert ledger.take("gang-0/1") == suspect
    assert ledger.take("gang-0/0") == "wait"
    (verdict,) = ledger.end([], {"gang-0/1": "killed again"})
    assert verdict == Death(suspect, "killed again")


def test_a_pack_whose_worker_died_is_cut_into_even_parts() -> None:
    pack = pack_of(*(f"u{n:02d}" for n in range(20)))
    ledger = Ledger([pack])
    ledger.take("gang-0/0")
    (verdict,) = ledger.end([], {"gang-0/0": "killed"})
    assert isinstance(verdict, Split)
    assert len(verdict.parts) == PARTS
    assert {len(part.users) for part in verdict.parts} == {2, 3}
    assert [u for part in verdict.parts for u in part.users] == list(pack.users)
    assert verdict.parts == split_pack(pack)


def test_what_is_settled_is_not_handed_out() -> None:
    made = [pack_of("a"), pack_of("b")]
    ledger = Ledger(made, settled={made[0].pack_id})
    assert ledger.take("gang-0/0") == made[1]
    ledger.release("gang-0/0")
    assert ledger.take("gang-0/1") == made[1]
    ledger.done(made[1].pack_id)
    assert ledger.left == 0
