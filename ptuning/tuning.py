"""Tune many users in this process: the library's own entry, without any cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ptuning.data.examples import (
    DataConfig,
    arrange,
    check_example,
    data_digest,
    too_few,
    why_too_few,
)
from ptuning.errors import ConfigError, CorruptArtifact, PTuningError, WrongUser
from ptuning.methods.base import Method
from ptuning.methods.catalogue import default_method
from ptuning.model.backbone import Backbone
from ptuning.prefix.artifact import ArtifactConfig, Prefix, make_prefix
from ptuning.train.config import TrainConfig, Trained, UserRows
from ptuning.train.packed import train_pack
from ptuning.train.resume import Resume
from ptuning.train.step import LocalDriver
from ptuning.types import EpochLoss, Example, user_key
from ptuning.users import (
    Recipe,
    belongs,
    check_init_text,
    check_resume,
    meta_of,
    prepare,
    warm_start,
)


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """One user's outcome. `prefix` is None unless `status` is "trained".

    `tokens` are real ones that were trained on; `resets` says how often the training began again
    at a lower rate, because its loss was no longer finite.
    """

    status: Literal["trained", "too_few", "failed"]
    prefix: Prefix | None = None
    history: list[EpochLoss] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    resets: int = 0
    error: str | None = None
    resume: Resume | None = None  # what continues the training, with train.keep_resume


def tune(
    backbone: Backbone,
    users: Mapping[str, Sequence[Example]],
    *,
    method: Method | None = None,
    train: TrainConfig | None = None,
    data: DataConfig | None = None,
    artifact: ArtifactConfig | None = None,
    prefix_name: str = "default",
    min_valid_tokens: int = 64,
    start: Mapping[str, Prefix] | None = None,
    resume: Mapping[str, Resume] | None = None,
) -> dict[str, TuneResult]:
    """Train one prefix per user, many users in one forward pass.

    `users` maps user ids to their examples; rows without a split are split by time
    (DataConfig). With fewer validation tokens than `min_valid_tokens` a user's last epoch is
    kept, not the best: so few would choose by chance. Users in `start` begin from a trained
    prefix of the same method and sizes, users in `resume` where an earlier training on the same
    rows stopped (TuneResult.resume); each user's must be their own. The result has every user of
    `users`; one whose rows cannot be used fails alone. Of `data`, `max_length`, `max_rows` and
    `min_examples` count; the template is the backbone's. Raises MethodError where the backbone
    cannot do the method, ConfigError where `start` or `resume` name nobody who is trained, and
    BackboneChanged where the weights are not the same after as before.
    """
    data = data or DataConfig()
    artifact = artifact or ArtifactConfig()
    recipe = Recipe(
        method or default_method(),
        train or TrainConfig(),
        data.max_length,
        prefix_name,
        artifact.dtype,
        min_valid_tokens,
    )
    recipe.method.check(backbone.facts)
    check_init_text(backbone.template, recipe.method)
    _check_beginnings(recipe, users, start or {}, resume or {})
    before = backbone.checksum()
    results: dict[str, TuneResult] = {}
    ready: list[tuple[str, list[Example], UserRows]] = []
    for user_id, examples in users.items():
        begin = (start or {}).get(user_id), (resume or {}).get(user_id)
        try:
            read = _read(backbone, recipe, data, user_id, examples, *begin)
        except (PTuningError, UnicodeError) as error:  # UnicodeError: text that is no Unicode
            read = TuneResult(status="failed", error=str(error))
        if isinstance(read, TuneResult):
            results[user_id] = read
        else:
            ready.append((user_id, *read))
    size = recipe.train.pack_users
    for at in range(0, len(ready), size):
        pack = ready[at : at + size]
        machine = train_pack(
            backbone,
            recipe.method,
            recipe.train,
            [rows for _, _, rows in pack],
            recipe.min_valid_tokens,
        )
        for (user_id, rows, _), trained in zip(
            pack, LocalDriver(backbone).run(machine), strict=True
        ):
            origin = _origin((start or {}).get(user_id), (resume or {}).get(user_id))
            results[user_id] = _result(backbone, recipe, artifact, user_id, rows, trained, origin)
    backbone.verify_unchanged(before)
    return {user_id: results[user_id] for user_id in users}


def _read(
    backbone: Backbone,
    recipe: Recipe,
    data: DataConfig,
    user_id: str,
    examples: Sequence[Example],
    start: Prefix | None,
    resume: Resume | None,
) -> tuple[list[Example], UserRows] | TuneResult:
    """The user's rows as they are kept and as they are trained, or why they are too few."""
    for example in examples:
        check_example(example)
    if too_few(arranged := arrange(examples), data.min_examples):
        return TuneResult(status="too_few", error=why_too_few(arranged, data.min_examples))
    rows = arrange(examples, data.max_rows)
    own = prepare(backbone.template, recipe, user_key(user_id), rows)
    return rows, _begun(backbone, recipe, own, rows, start, resume)


def _result(
    backbone: Backbone,
    recipe: Recipe,
    artifact: ArtifactConfig,
    user_id: str,
    rows: Sequence[Example],
    trained: Trained,
    started_from: str,
) -> TuneResult:
    def failed(error: str | None) -> TuneResult:
        return TuneResult(
            status="failed",
            history=trained.history,
            steps=trained.steps,
            tokens=trained.tokens,
            resets=trained.resets,
            error=error,
        )

    if trained.members is None:
        return failed(trained.error)
    key = user_key(user_id)
    meta = meta_of(backbone, recipe, key, rows, started_from)
    prefix = make_prefix(trained.members, meta, artifact)
    try:
        prefix.check_finite()
    except CorruptArtifact as error:
        return failed(str(error))
    return TuneResult(
        status="trained",
        prefix=prefix,
        history=trained.history,
        steps=trained.steps,
        tokens=trained.tokens,
        resets=trained.resets,
        resume=Resume(
            trained.states, belongs(backbone, recipe, key, meta.data_digest, started_from)
        )
        if trained.states
        else None,
    )


def _check_beginnings(
    recipe: Recipe,
    users: Mapping[str, Sequence[Example]],
    start: Mapping[str, Prefix],
    resume: Mapping[str, Resume],
) -> None:
    """Raise ConfigError where a beginning that was asked for would be passed over."""
    if recipe.train.start != "init":
        raise ConfigError(
            "train.start is for runs, which know each user's champion and kept training states",
            seen=f"train.start={recipe.train.start}",
            expected="train.start=init",
            fix="give tune the prefixes as `start`, or the training states as `resume`",
        )
    beginnings: dict[str, Mapping[str, object]] = {"start": start, "resume": resume}
    for name, given in beginnings.items():
        if strangers := sorted({*given} - {*users}):
            raise ConfigError(
                f"{name} names users who are not trained",
                seen=", ".join(strangers[:3]),
                expected="user ids of `users`",
                fix=f"correct the ids in {name}, or leave them out",
            )
        if nothing := sorted(user for user, own in given.items() if own is None):
            raise ConfigError(
                f"{name} has nothing to begin from",
                seen=f"None for {', '.join(nothing[:3])}",
                expected="a Prefix in start, a Resume in resume",
                fix="leave the user out; TuneResult.resume is kept with train.keep_resume=True",
            )


def _origin(start: Prefix | None, resume: Resume | None) -> str:
    """The digest of the prefix that a training began as, however often it went on; "": none."""
    if resume is not None:
        return resume.belongs.started_from
    return "" if start is None else start.digest


def _begun(
    backbone: Backbone,
    recipe: Recipe,
    rows: UserRows,
    examples: Sequence[Example],
    start: Prefix | None,
    resume: Resume | None,
) -> UserRows:
    """The user's rows with what their training begins from."""
    if start is not None and resume is not None:
        raise ConfigError(
            "a training begins from a prefix or goes on from a state, not both",
            seen="the user in start and in resume",
            fix="leave the user out of one of them",
        )
    if resume is not None:
        check_resume(backbone, recipe, resume, rows.user_key, data_digest(examples))
        return replace(rows, states=resume.states)
    if start is None:
        return rows
    if start.meta.user_key != rows.user_key:
        raise WrongUser(
            "the prefix to start from belongs to another user",
            seen=start.meta.user_key,
            expected=rows.user_key,
            fix="a start that users share must be made of public data and be saved as theirs",
        )
    return replace(rows, start=warm_start(recipe, backbone, start))
