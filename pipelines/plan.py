"""Which users train together, and on which worker: pure functions of the index.

Users of one bucket stay together (a pack reads one or two bucket files), and packs are
balanced by supervised tokens, the work they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ptuning.types import Status


@dataclass(frozen=True, kw_only=True)
class PlannedUser:
    """One user of a pack; the champion it must beat, if it has one."""

    user_key: str
    bucket: int
    tokens: int
    data_digest: str
    training_digest: str
    champion_uri: str | None = None
    champion_digest: str | None = None
    candidate_digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Users that train together in one process. The id is made from what they train."""

    pack_id: str
    users: tuple[PlannedUser, ...]

    @property
    def tokens(self) -> int:
        return sum(user.tokens for user in self.users)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's packs, and the users that are not trained with the reason why."""

    packs: tuple[Pack, ...] = ()
    skipped: Mapping[str, Status] = field(default_factory=dict)  # user_key -> status

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        packs = tuple(
            Pack(
                pack_id=pack["pack_id"],
                users=tuple(PlannedUser(**user) for user in pack["users"]),
            )
            for pack in value["packs"]
        )
        return cls(packs=packs, skipped=dict(value["skipped"]))


def make_packs(users: Sequence[PlannedUser], pack_users: int, workers: int) -> tuple[Pack, ...]:
    """Cut users, in the order of their buckets, into packs of at most `pack_users`.

    At least one pack per worker where there are users enough, so that nobody idles.
    """
    if not users:
        return ()
    ordered = sorted(users, key=lambda user: (user.bucket, user.user_key))
    count = max(-(-len(ordered) // pack_users), min(workers, len(ordered)))
    per_pack = sum(user.tokens for user in ordered) / count
    packs: list[list[PlannedUser]] = [[]]
    for position, user in enumerate(ordered):
        filled = sum(one.tokens for one in packs[-1])
        left = len(ordered) - position
        open_packs = count - len(packs)
        # A pack ends when it is full, or has its share of the tokens and the rest fits the others.
        enough = filled >= per_pack and left <= open_packs * pack_users and open_packs > 0
        if packs[-1] and (len(packs[-1]) >= pack_users or enough or left <= open_packs):
            packs.append([])
        packs[-1].append(user)
    return tuple(Pack(pack_id=_pack_id(pack), users=tuple(pack)) for pack in packs)


def _pack_id(users: Sequence[PlannedUser]) -> str:
    text = "\n".join(f"{user.user_key} {user.training_digest}" for user in users)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def assign(packs: Sequence[Pack], workers: int) -> list[list[Pack]]:
    """Share packs among workers, the heaviest first to whoever has least (Graham 1969, LPT)."""
    shares: list[list[Pack]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for pack in sorted(packs, key=lambda pack: (-pack.tokens, pack.pack_id)):
        worker = loads.index(min(loads))
        shares[worker].append(pack)
        loads[worker] += pack.tokens
    return shares
