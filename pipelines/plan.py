"""Plan a run: which users train, are only judged again or retire, and which train together.

These are pure functions that read neither a store nor a registry. The plan trusts a version's
digests. Whether prefix files are intact is checked elsewhere, for a sample of users per run
(pipelines/candidates/lost.py), and the keys found are passed in as `lost`. Hashing every file of a
million users would read 0.7 TB a night, to find what a service reports anyway when it first reads
such a file.

Packs are ranges of user keys, as are the files of rows, so that a pack reads one or two files. They
are balanced by supervised tokens, which measure the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ptuning.errors import RunError
from ptuning.registry.base import Current
from ptuning.types import Split, Status

OnShrink = Literal["base", "keep"]


@dataclass(frozen=True, kw_only=True)
class IndexRow:
    """One user in the partition's index: the number of the rows, and their digest."""

    user_id: str
    user_key: str
    tokens: int  # supervised
    data_digest: str
    too_few: bool
    rows: Mapping[Split, int] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> IndexRow:
        """From a row of the index file (INDEX_SCHEMA)."""
        return cls(
            user_id=values["user_id"],
            user_key=values["user_key"],
            tokens=values["supervised_tokens"],
            data_digest=values["data_digest"],
            too_few=values["too_few"],
            rows={
                "train": values["rows_train"],
                "valid": values["rows_valid"],
                "test": values["rows_test"],
            },
        )


@dataclass(frozen=True, kw_only=True)
class PlannedUser:
    """One user of a pack, with the champion to beat, if there is one.

    For a user who is only judged again, `run_id` and `pack_id` identify the done-record with the
    losses, and `candidate_digest` is the prefix to be judged.
    """

    user_key: str
    tokens: int
    data_digest: str
    training_digest: str
    champion_digest: str | None = None
    candidate_digest: str | None = None
    run_id: str = ""
    pack_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Users that one process trains together. The id is a hash of their training digests."""

    pack_id: str
    users: tuple[PlannedUser, ...]

    @property
    def tokens(self) -> int:
        return sum(user.tokens for user in self.users)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The settings that decide which users train.

    `identity(user_key, data_digest)` is the training digest of a user's rows. `everybody` says
    whether the index has all users of the data. With `data.max_users` it does not, so users who are
    absent from it do not count as gone.
    """

    identity: Callable[[str, str], str]
    gate_digest: str
    pack_users: int
    workers: int
    on_shrink: OnShrink = "base"
    max_shrink: float = 0.2
    everybody: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does with each user.

    `packs` are trained. `judged` have an unchanged prefix, which a changed gate judges from stored
    losses. `skipped` are neither, each with its status in the report; those with status `retired`
    lose their champion. `kept` counts users who would retire if `data.on_shrink` were not `keep`.
    `notes` are sentences for the report. `planned_at`, in epoch milliseconds, orders runs: an
    earlier plan's run does not undo the decisions of a later one.
    """

    packs: tuple[Pack, ...] = ()
    judged: tuple[Pack, ...] = ()
    skipped: Mapping[str, Status] = field(default_factory=dict)  # user_key -> status
    kept: int = 0
    notes: tuple[str, ...] = ()
    planned_at: int = 0

    @property
    def retired(self) -> tuple[str, ...]:
        """Keys of the users who lose their champion, sorted."""
        return tuple(sorted(key for key, status in self.skipped.items() if status == "retired"))

    def train_instead(self, keys: Collection[str], rules: Rules) -> Plan:
        """The plan in which the judged users in `keys` train, because their stored losses cannot be
        found."""
        if not keys:
            return self
        judged = [user for pack in self.judged for user in pack.users]
        training = [user for pack in self.packs for user in pack.users]
        training += [user for user in judged if user.user_key in keys]
        judged = [user for user in judged if user.user_key not in keys]
        note = f"{len(keys):,} users train again: the losses for the changed gate are gone"
        return Plan(
            packs=make_packs(training, rules.pack_users, rules.workers),
            judged=make_packs(judged, rules.pack_users, 1),
            skipped=self.skipped,
            kept=self.kept,
            notes=(*self.notes, note),
            planned_at=self.planned_at,
        )


def plan_users(
    users: Iterable[tuple[IndexRow, Current | None]],
    served: Iterable[str],
    rules: Rules,
    lost: Collection[str] = (),
) -> Plan:
    """Decide about every user, in one pass over the index.

    `users` are the index's rows, each with the user's versions in the registry. `served` are the
    keys of all users who have a champion, `lost` those whose prefix file is known to be gone. Only
    the plan and the keys of `served` are kept in memory.

    A user with a champion retires if there are too few rows, or none, and `on_shrink` is `base`.
    Raises RunError if more than `max_shrink` of the served users would retire: a lost input file
    looks just like users who left, and only a person can tell them apart.
    """
    trained: list[PlannedUser] = []
    judged: list[PlannedUser] = []
    skipped: dict[str, Status] = {}
    gone = set(served)
    count, shrunk = len(gone), 0
    for row, now in users:
        has_champion = row.user_key in gone or (now is not None and now.champion is not None)
        gone.discard(row.user_key)
        if row.too_few:
            shrunk += has_champion
            retires = has_champion and rules.on_shrink == "base"
            skipped[row.user_key] = "retired" if retires else "too_few"
            continue
        user = _planned(row, now, rules)
        match _compare(user, now, rules, row.user_key in lost):
            case "train":
                trained.append(user)
            case "judge":
                judged.append(user)
            case "unchanged":
                skipped[row.user_key] = "unchanged"
    gone = gone if rules.everybody else set()
    shrunk += len(gone)
    if rules.on_shrink == "base":
        _check_shrink(shrunk, count, rules.max_shrink)
        skipped |= dict.fromkeys(gone, "retired")
    return Plan(
        packs=make_packs(trained, rules.pack_users, rules.workers),
        judged=make_packs(judged, rules.pack_users, 1),
        skipped=skipped,
        kept=0 if rules.on_shrink == "base" else shrunk,
        notes=_notes(rules, lost),
    )


def _planned(row: IndexRow, now: Current | None, rules: Rules) -> PlannedUser:
    champion = now.champion if now else None
    candidate = now.candidate if now else None
    return PlannedUser(
        user_key=row.user_key,
        tokens=row.tokens,
        data_digest=row.data_digest,
        training_digest=rules.identity(row.user_key, row.data_digest),
        champion_digest=champion.digest if champion else None,
        candidate_digest=candidate.digest if candidate else None,
        run_id=candidate.run_id if candidate else "",
        pack_id=candidate.pack_id if candidate else "",
    )


def _compare(
    user: PlannedUser, now: Current | None, rules: Rules, lost: bool
) -> Literal["train", "judge", "unchanged"]:
    """What to do with a user. If training again would give the existing candidate, at most the
    gate's decision is out of date; without a record of its losses the user trains anyway."""
    candidate = now.candidate if now else None
    if lost or candidate is None or candidate.training_digest != user.training_digest:
        return "train"
    if candidate.gate_digest == rules.gate_digest:
        return "unchanged"
    return "judge" if user.run_id and user.pack_id else "train"


def _check_shrink(shrunk: int, served: int, most: float) -> None:
    if shrunk <= most * served:
        return
    raise RunError(
        "too many users would lose their prefix: their rows are gone or too few",
        seen=f"{shrunk:,} of {served:,} served users",
        expected=f"at most data.max_shrink = {most:g} of them",
        fix="check that --data is complete (under data.delivery=snapshot what is missing is gone); "
        "if these users did leave, raise data.max_shrink, or keep their prefixes with "
        "data.on_shrink=keep",
    )


def _notes(rules: Rules, lost: Collection[str]) -> tuple[str, ...]:
    notes = []
    if not rules.everybody:
        notes.append("data.max_users is set, so users who are absent from the data keep serving")
    if lost:
        notes.append(f"{len(lost):,} users train again: their prefix file is lost or damaged")
    return tuple(notes)


def make_packs(users: Sequence[PlannedUser], pack_users: int, workers: int) -> tuple[Pack, ...]:
    """Split users, in the order of their keys, into packs of at most `pack_users`.

    If there are enough users, every worker gets at least one pack.
    """
    if not users:
        return ()
    ordered = sorted(users, key=lambda user: user.user_key)
    count = max(-(-len(ordered) // pack_users), min(workers, len(ordered)))
    per_pack = sum(user.tokens for user in ordered) / count
    packs: list[list[PlannedUser]] = [[]]
    filled = 0  # tokens of the last pack
    for position, user in enumerate(ordered):
        left = len(ordered) - position
        open_packs = count - len(packs)
        # A pack ends when it is full, or has its share of tokens and the rest fits into the others.
        enough = filled >= per_pack and left <= open_packs * pack_users and open_packs > 0
        if packs[-1] and (len(packs[-1]) >= pack_users or enough or left <= open_packs):
            packs.append([])
            filled = 0
        packs[-1].append(user)
        filled += user.tokens
    return tuple(make_pack(pack) for pack in packs)


def make_pack(users: Sequence[PlannedUser]) -> Pack:
    """A pack of these users; the same users and trainings give the same id."""
    text = "\n".join(f"{user.user_key} {user.training_digest}" for user in users)
    return Pack(pack_id=hashlib.sha256(text.encode()).hexdigest()[:16], users=tuple(users))
