"""One pack's work on a worker: read its users' rows, train, score, and describe the outcome.

A step machine like the trainers it calls, so that a worker on a sharded backbone goes
through the same code in lock-step with its peers.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.plan import Pack, PlannedUser
from pipelines.rows.partition import read_users
from ptuning.data.encode import Encoded
from ptuning.data.layout import Arrangement
from ptuning.errors import ArtifactError, CorruptArtifact, PTuningError, WrongMethod
from ptuning.model.backbone import Backbone
from ptuning.prefix.artifact import ArtifactConfig, Prefix, make_prefix, pack_prefix
from ptuning.scoring import score_split
from ptuning.store import Store, prefix_path, resume_path
from ptuning.train.config import Trained, UserRows
from ptuning.train.packed import train_pack
from ptuning.train.resume import Resume
from ptuning.train.start import positions_of
from ptuning.train.step import Machine
from ptuning.types import Example, Split, UserReport, seed_of
from ptuning.users import Recipe, belongs, check_resume, meta_of, prepare, warm_start


@dataclass(frozen=True)
class PackJob:
    """What a worker needs besides the pack: where the rows are and how to train."""

    store: Store
    partition_id: str
    recipe: Recipe
    artifact: ArtifactConfig


@dataclass
class _Member:
    """One user while its pack is worked on."""

    planned: PlannedUser
    report: UserReport
    examples: Sequence[Example] = ()
    rows: UserRows | None = None
    prefix: Prefix | None = None
    champion: Prefix | None = None
    started_from: str = ""  # digest of the prefix that the training began as

    def fail(self, stage: str, error: object) -> None:
        self.report.status, self.report.stage = "failed", stage
        self.report.error = str(error)
        self.rows = None


def pack_machine(backbone: Backbone, job: PackJob, pack: Pack) -> Machine[list[UserReport]]:
    """Train and score every user of a pack; prefix files are written, nothing is committed."""
    members = [
        _Member(user, UserReport(user_key=user.user_key, status="trained")) for user in pack.users
    ]
    _read_rows(backbone, job, members)
    ready = [member for member in members if member.rows is not None]
    if ready:
        trained = yield from train_pack(
            backbone,
            job.recipe.method,
            job.recipe.train,
            [_rows(member) for member in ready],
            job.recipe.min_valid_tokens,
        )
        for member, outcome in zip(ready, trained, strict=True):
            _keep(backbone, job, member, outcome)
        yield from _score(backbone, job, [member for member in ready if member.prefix is not None])
    return [member.report for member in members]


def _rows(member: _Member) -> UserRows:
    assert member.rows is not None
    return member.rows


def _read_rows(backbone: Backbone, job: PackJob, members: Sequence[_Member]) -> None:
    """Give every member its own rows, matched by key; one that cannot be read fails alone."""
    by_bucket: dict[int, list[_Member]] = defaultdict(list)
    for member in members:
        by_bucket[member.planned.bucket].append(member)
    for bucket, group in sorted(by_bucket.items()):
        try:
            together = _examples(job, bucket, [member.planned.user_key for member in group])
        except (PTuningError, OSError):
            together = None  # then one by one, so that only who cannot be read fails
        for member in group:
            key = member.planned.user_key
            try:
                found = _examples(job, bucket, [key]) if together is None else together
                if key not in found:
                    raise PTuningError("the user's rows are not in their bucket", seen=bucket)
                member.examples = found[key]
                member.rows = prepare(backbone.template, job.recipe, key, found[key])
                _check_data(backbone, job, member)
                member.champion = _champion(backbone, job, member)
                member.rows = _begun(backbone, job, member)
            except (PTuningError, OSError) as error:
                member.fail("tune", error)


def _examples(job: PackJob, bucket: int, keys: Sequence[str]) -> dict[str, list[Example]]:
    """The users' rows by key; raises where one of them cannot be read."""
    return read_users(job.store, job.partition_id, bucket, keys)


def _check_data(backbone: Backbone, job: PackJob, member: _Member) -> None:
    meta = meta_of(backbone, job.recipe, member.planned.user_key, member.examples)
    if meta.training_digest != member.planned.training_digest:
        raise PTuningError(
            "the worker would train something else than was planned",
            seen=meta.training_digest[:12],
            expected=member.planned.training_digest[:12],
            fix="the same backbone, tokenizer and partition must be visible to every worker",
        )


def _champion(backbone: Backbone, job: PackJob, member: _Member) -> Prefix | None:
    """The prefix the user has now, if this backbone can still use it."""
    planned = member.planned
    if planned.champion_digest is None:
        return None
    try:
        return Prefix.from_bytes(
            job.store.read(prefix_path(planned.user_key, planned.champion_digest)),
            backbone,
            user_key=planned.user_key,
            prefix_name=job.recipe.prefix_name,
            digest=planned.champion_digest,
        )
    except (ArtifactError, FileNotFoundError) as error:
        # It cannot serve either. What may only be a hiccup is raised, and fails the user.
        member.report.details["champion_ignored"] = str(error)
        return None


def _begun(backbone: Backbone, job: PackJob, member: _Member) -> UserRows:
    """The member's rows with what `train.start` begins from; from the start, where that cannot
    be had."""
    planned, start, rows = member.planned, job.recipe.train.start, _rows(member)
    if start == "champion" and member.champion is not None:
        try:
            begun = warm_start(job.recipe, backbone, member.champion)
        except WrongMethod as error:
            member.report.details["start_ignored"] = str(error)
            return rows
        member.report.details["started_from"] = planned.champion_digest
        member.started_from = member.champion.digest
        return replace(rows, start=begun)
    if start == "resume" and planned.candidate_digest is not None:
        path = resume_path(planned.user_key, planned.candidate_digest)
        try:
            kept = Resume.from_bytes(job.store.read(path))
            check_resume(backbone, job.recipe, kept, planned.user_key, planned.data_digest)
        except (ArtifactError, FileNotFoundError) as error:
            member.report.details["start_ignored"] = str(error)
            return rows
        member.report.details["continued_from"] = planned.candidate_digest
        member.started_from = kept.belongs.started_from
        return replace(rows, states=kept.states)
    return rows


def _keep(backbone: Backbone, job: PackJob, member: _Member, outcome: Trained) -> None:
    report = member.report
    report.history, report.steps, report.tokens = outcome.history, outcome.steps, outcome.tokens
    if outcome.resets:
        report.details["resets"] = outcome.resets
    if outcome.members is None:
        member.fail("tune", outcome.error)
        return
    meta = meta_of(backbone, job.recipe, member.planned.user_key, member.examples)
    prefix = make_prefix(outcome.members, meta, job.artifact)
    try:
        prefix.check_finite()
    except CorruptArtifact as error:
        member.fail("tune", error)
        return
    member.prefix = prefix
    # The digest is in the name: another attempt can write the same file, never another into it.
    # Written even where it exists: the one that is there may be damaged.
    path = prefix_path(member.planned.user_key, member.prefix.digest)
    job.store.write(path, member.prefix.to_bytes())
    if outcome.states:
        own = belongs(
            backbone,
            job.recipe,
            report.user_key,
            member.planned.data_digest,
            member.started_from,
        )
        resume = Resume(outcome.states, own)
        job.store.write(resume_path(report.user_key, member.prefix.digest), resume.to_bytes())
    report.digest = member.prefix.digest


def _score(backbone: Backbone, job: PackJob, members: Sequence[_Member]) -> Machine[None]:
    """Losses of every member under the base, its champion, its candidate and a neighbour's."""
    others = _others(members)
    for member in members:
        _leave_out_too_long(backbone, member, others.get(member.planned.user_key))
    judges = (
        ("base", [None] * len(members)),
        ("champion", [member.champion for member in members]),
        ("candidate", [member.prefix for member in members]),
        ("other", [others.get(member.planned.user_key) for member in members]),
    )
    splits: tuple[Split, ...] = ("valid", "test")
    for split in splits:
        for who, prefixes in judges:
            if who != "base" and not any(prefixes):
                continue
            for group in _alike(prefixes) if who != "base" else [list(range(len(members)))]:
                own = [prefix for n in group if (prefix := prefixes[n]) is not None]
                losses = yield from score_split(
                    backbone,
                    [_scored_rows(backbone, members[n], prefixes[n], split) for n in group],
                    pack_prefix(own, backbone) if own else None,
                    job.recipe.train.tokens_per_microbatch,
                    own[0].method.members if own else 1,
                )
                for n, loss in zip(group, losses, strict=True):
                    if loss.tokens:
                        members[n].report.losses.setdefault(who, {})[split] = loss


def _leave_out_too_long(backbone: Backbone, member: _Member, other: Prefix | None) -> None:
    """All judges see the same rows, so test rows that one of them has no positions for are left
    out; so is a champion that the validation rows do not fit (the candidate's fit: it trained).
    """
    limit, rows = backbone.facts.max_positions, _rows(member)
    if limit is None:
        return

    def fits(row: Encoded, prefix: Prefix | None) -> bool:
        around = Arrangement() if prefix is None else prefix.arrangement(backbone.template)
        shapes = {} if prefix is None else prefix.shapes
        return positions_of(around.row(row), backbone.facts, shapes) <= limit

    if member.champion and not all(fits(row, member.champion) for row in rows.valid):
        member.champion = None
        reason = "the backbone has too few positions for it beside the validation rows"
        member.report.details["champion_ignored"] = reason
    judges = (member.prefix, member.champion, other)
    test = tuple(row for row in rows.test if all(fits(row, prefix) for prefix in judges))
    if len(test) < len(rows.test):
        member.report.details["test_rows_too_long"] = len(rows.test) - len(test)
        member.rows = replace(rows, test=test)


def _scored_rows(
    backbone: Backbone, member: _Member, prefix: Prefix | None, split: Split
) -> list[Encoded]:
    """A member's rows of a split, arranged as the prefix that is judged on them wants it."""
    rows: Sequence[Encoded] = getattr(_rows(member), split)
    if prefix is None:
        return list(rows)
    around = prefix.arrangement(backbone.template)
    return [around.judged_row(row) for row in rows]


def _others(members: Sequence[_Member]) -> Mapping[str, Prefix]:
    """For each member the prefix of another, drawn by the member's own seed."""
    drawn = {}
    for member in members:
        rest = [one.prefix for one in members if one is not member and one.prefix is not None]
        if rest:
            picker = random.Random(seed_of(member.planned.user_key, "other"))
            drawn[member.planned.user_key] = picker.choice(rest)
    return drawn


def _alike(prefixes: Sequence[Prefix | None]) -> list[list[int]]:
    """Places of prefixes of one kind, which can be stacked: same tensors, seen the same way."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for n, prefix in enumerate(prefixes):
        if prefix is not None:
            shapes = tuple(sorted(prefix.shapes.items()))
            groups[(shapes, prefix.method.members, prefix.method.visibility)].append(n)
    return list(groups.values())
