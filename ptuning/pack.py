"""Train, save and score the prefixes of one pack of users.

The library's `tune` and the cluster's workers both call `run_pack`, so a prefix does not depend
on which of them made it. Like the trainers it calls, it is a step machine: workers that share a
sharded backbone run it in lock-step. A user whose rows, start or training fails does not affect
the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from ptuning.data.encode import Encoded, Template
from ptuning.data.examples import data_digest
from ptuning.errors import (
    ArtifactError,
    ConfigError,
    CorruptArtifact,
    DataError,
    PTuningError,
    WrongUser,
)
from ptuning.identity import (
    BackboneIdentity,
    Recipe,
    describe_prefix,
    describe_state,
    digest_training,
)
from ptuning.model.backbone import Backbone
from ptuning.prefix.artifact import Prefix, make_prefix
from ptuning.scoring import ScoredUser, score_users
from ptuning.train.config import Trained, UserRows
from ptuning.train.packed import train_pack
from ptuning.train.resume import Resume
from ptuning.train.start import warm_start
from ptuning.train.step import Machine, predicted
from ptuning.train.words import choose_init_ids
from ptuning.types import SPLITS, Counts, EpochLoss, Example, Split, SplitLosses, seed_of


class Keeper(Protocol):
    """Where finished prefixes are stored. A digest names the contents: a second attempt at the
    same training may rewrite the file, but only with the same bytes."""

    def keep_prefix(self, user_key: str, digest: str, data: bytes) -> None:
        """Save a prefix file."""

    def keep_resume(self, user_key: str, digest: str, data: bytes) -> None:
        """Save the resume file of the prefix with that digest."""


@dataclass(frozen=True, kw_only=True)
class PackUser:
    """The input to one user's training.

    `examples` are already selected, split and sorted, oldest first. Training starts from the
    prefix `start` or continues from `resume`. If that does not fit, the user fails or, with
    `otherwise="init"`, starts from the method's own initialisation. `planned` is the training
    digest that the plan expects; the user fails if the rows or the backbone give another one.
    `champion` is scored beside the candidate.
    """

    user_key: str
    examples: Sequence[Example]
    start: Prefix | None = None
    resume: Resume | None = None
    otherwise: Literal["fail", "init"] = "fail"
    planned: str | None = None
    champion: Prefix | None = None


@dataclass(kw_only=True)
class PackResult:
    """The outcome for one user. If the user failed, `prefix` is None and `error` says why.

    `tokens` counts the real tokens trained on; `resets` counts restarts at a lower learning rate.
    `started_from` is the digest of the prefix that the training started from, and `resumed` says
    whether it continued a saved state. `start_ignored` and `champion_ignored` say why a start or a
    champion was not used. `counts` and `losses` are as in UserReport; `losses` stays empty unless
    scoring was requested.
    """

    user_key: str
    prefix: Prefix | None = None
    resume: Resume | None = None
    history: list[EpochLoss] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    resets: int = 0
    error: str | None = None
    started_from: str = ""
    resumed: bool = False
    start_ignored: str = ""
    champion_ignored: str = ""
    test_rows_too_long: int = 0
    counts: dict[Split, Counts] = field(default_factory=dict)
    losses: dict[str, dict[str, SplitLosses]] = field(default_factory=dict)


@dataclass
class _Work:
    """A user's state while the pack runs; `rows` is None if the user failed."""

    user: PackUser
    result: PackResult
    data_digest: str = ""
    rows: UserRows | None = None


def run_pack(
    backbone: Backbone,
    recipe: Recipe,
    users: Sequence[PackUser],
    keeper: Keeper | None = None,
    *,
    score: bool = False,
    on_trained: Callable[[str], None] | None = None,
) -> Machine[list[PackResult]]:
    """Train, save and, with `score`, score every user of a pack; results in the order of `users`.
    `on_trained` is called with a user's key when their training ends, before the prefix is saved.

    Raises MethodError if the backbone does not support the method, and whatever `keeper` raises.
    Example: `LocalDriver(backbone).run(run_pack(backbone, Recipe(method, train), users))`.
    """
    works = [_prepare(backbone, recipe, user) for user in users]
    ready = [(work, work.rows) for work in works if work.rows is not None]
    if ready:
        rows = [rows for _, rows in ready]
        trained = yield from train_pack(backbone, recipe.method, recipe.train, rows, on_trained)
        for (work, _), outcome in zip(ready, trained, strict=True):
            _finish(backbone, recipe, work, outcome, keeper)
        if score:
            yield from _score(backbone, recipe, works)
    return [work.result for work in works]


def encode_user(
    template: Template, recipe: Recipe, user_key: str, examples: Sequence[Example]
) -> UserRows:
    """Encode a user's selected examples for training, with init words and a seed.

    Raises DataError if an example cannot be encoded (a partition quarantines those) or if there
    are no train rows.
    """
    by_split: dict[Split, list[Encoded]] = {split: [] for split in SPLITS}
    for example in examples:
        by_split[example.split or "train"].append(template.encode(example, recipe.max_length))
    if not by_split["train"]:
        raise DataError(
            "the user has no train rows",
            seen={split: len(rows) for split, rows in by_split.items() if rows},
            fix="name 'train' as the split of some rows, or leave split out",
        )
    seed = seed_of(recipe.train.seed, user_key, recipe.prefix_name)
    init_ids, spans = choose_init_ids(template, recipe.method, examples, seed)
    return UserRows(
        user_key=user_key,
        seed=seed,
        train=tuple(by_split["train"]),
        valid=tuple(by_split["valid"]),
        test=tuple(by_split["test"]),
        init_ids=init_ids,
        spans=spans,
    )


def _prepare(backbone: Backbone, recipe: Recipe, user: PackUser) -> _Work:
    work = _Work(user, PackResult(user_key=user.user_key))
    try:
        work.data_digest = data_digest(user.examples)
        _check_planned(backbone, recipe, work)
        rows = encode_user(backbone.template, recipe, user.user_key, user.examples)
        work.rows = _begin(backbone, recipe, work, rows)
    except (PTuningError, UnicodeError) as error:  # UnicodeError: the text is not valid Unicode
        work.result.error = str(error)
    else:
        work.result.counts = _count(rows)
    return work


def _check_planned(backbone: Backbone, recipe: Recipe, work: _Work) -> None:
    planned = work.user.planned
    if planned is None:
        return
    known = BackboneIdentity.of(backbone)
    digest = digest_training(recipe, known, work.user.user_key, work.data_digest)
    if digest != planned:
        raise PTuningError(
            "the worker would train something other than what was planned",
            seen=digest[:12],
            expected=planned[:12],
            fix="the same code, backbone, dtype, tokenizer and partition must be visible to every "
            "worker",
        )


def _count(rows: UserRows) -> dict[Split, Counts]:
    splits: dict[Split, tuple[Encoded, ...]] = {
        "train": rows.train,
        "valid": rows.valid,
        "test": rows.test,
    }
    return {
        split: Counts(rows=len(encoded), tokens=sum(predicted(row) for row in encoded))
        for split, encoded in splits.items()
    }


def _begin(backbone: Backbone, recipe: Recipe, work: _Work, rows: UserRows) -> UserRows:
    """Add the start of the training to the user's rows."""
    user = work.user
    if user.start is not None and user.resume is not None:
        raise ConfigError(
            "a training starts from a prefix or continues a saved state, not both",
            seen="the user in start and in resume",
            fix="leave the user out of one of them",
        )
    try:
        if user.resume is not None:
            return _continue(backbone, recipe, work, user.resume, rows)
        if user.start is not None:
            return _start(backbone, recipe, work, user.start, rows)
    except ArtifactError as error:
        if user.otherwise == "fail":
            raise
        work.result.start_ignored = str(error)
    return rows


def _continue(
    backbone: Backbone, recipe: Recipe, work: _Work, resume: Resume, rows: UserRows
) -> UserRows:
    expected = describe_state(backbone, recipe, work.user.user_key, work.data_digest)
    resume.check(expected, recipe.method, backbone.facts, recipe.train.epochs)
    work.result.started_from, work.result.resumed = resume.belongs.started_from, True
    return replace(rows, states=resume.states)


def _start(
    backbone: Backbone, recipe: Recipe, work: _Work, start: Prefix, rows: UserRows
) -> UserRows:
    if start.meta.user_key != work.user.user_key:
        raise WrongUser(
            "the prefix to start from belongs to another user",
            seen=start.meta.user_key,
            expected=work.user.user_key,
            fix="to share a start between users, train it on public data and save it for each user",
        )
    values = warm_start(recipe.method, backbone, start)
    work.result.started_from = start.digest
    return replace(rows, start=values)


def _finish(
    backbone: Backbone, recipe: Recipe, work: _Work, trained: Trained, keeper: Keeper | None
) -> None:
    """Make a prefix from the trained tensors and pass its file to the keeper."""
    key, result = work.user.user_key, work.result
    result.history, result.steps, result.tokens = trained.history, trained.steps, trained.tokens
    result.resets = trained.resets
    if trained.members is None:
        result.error = trained.error
        return
    meta = describe_prefix(backbone, recipe, key, work.data_digest, result.started_from)
    prefix = make_prefix(trained.members, meta, recipe.artifact)
    try:
        # The loss can be finite while the file's dtype overflows.
        prefix.check_finite()
    except CorruptArtifact as error:
        result.error = str(error)
        return
    result.prefix = prefix
    if trained.states:
        state = describe_state(backbone, recipe, key, work.data_digest, result.started_from)
        result.resume = Resume(trained.states, state)
    if keeper is not None:
        # Written even if the file exists: the existing one may be damaged.
        keeper.keep_prefix(key, prefix.digest, prefix.to_bytes())
        if result.resume is not None:
            keeper.keep_resume(key, prefix.digest, result.resume.to_bytes())


def _score(backbone: Backbone, recipe: Recipe, works: Sequence[_Work]) -> Machine[None]:
    scored = [
        (
            work.result,
            ScoredUser(
                user_key=work.user.user_key,
                valid=work.rows.valid,
                test=work.rows.test,
                candidate=work.result.prefix,
                champion=work.user.champion,
            ),
        )
        for work in works
        if work.rows is not None and work.result.prefix is not None
    ]
    users = [user for _, user in scored]
    yield from score_users(backbone, users, recipe.train.tokens_per_microbatch)
    for result, user in scored:
        result.losses, result.champion_ignored = user.losses, user.champion_ignored
        result.test_rows_too_long = user.test_rows_too_long
