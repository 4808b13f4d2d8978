"""Tune users in this process: the library's own entry, without any cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from ptuning.data.columns import Columns
from ptuning.data.examples import (
    DataConfig,
    arrange,
    check_example,
    check_row,
    too_few,
    why_too_few,
)
from ptuning.data.frames import Frame, frame_rows, frame_users, is_frame
from ptuning.data.values import read_user_id
from ptuning.errors import ConfigError, DataError, PTuningError
from ptuning.identity import Recipe
from ptuning.methods.base import Method
from ptuning.methods.catalogue import default_method
from ptuning.model.backbone import Backbone
from ptuning.pack import PackResult, PackUser, run_pack
from ptuning.prefix.artifact import ArtifactConfig, Prefix
from ptuning.train.config import TrainConfig
from ptuning.train.resume import Resume
from ptuning.train.step import LocalDriver
from ptuning.train.words import check_init_text
from ptuning.types import EpochLoss, Example, user_key

UserId = str | int  # a number is taken as its decimal text
Row = Example | Mapping[str, object]  # a mapping is read as a row of a file: data.columns
# By UserId (keys of mappings are invariant, so Any); or a table of everybody's rows, as its rows
# are: a DataFrame of pandas or polars, a Table of pyarrow.
Users = Mapping[Any, Iterable[Row] | Frame] | Frame


@dataclass(frozen=True, kw_only=True, repr=False)
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

    def __repr__(self) -> str:
        """One line, without tensors and without `error`, which may quote a row."""
        facts = [self.status, f"epochs={len(self.history)}", f"steps={self.steps}"]
        valid = [line["valid"] for line in self.history if line["valid"] is not None]
        if valid:
            facts.append(f"valid={min(valid):.4f}")
        if self.prefix is not None:
            facts.append(f"digest={self.prefix.digest[:12]}")
        return f"TuneResult({', '.join(facts)})"

    def require(self) -> Prefix:
        """The prefix. Raises DataError where the user has too few rows, and PTuningError where
        they failed, with the reason. Example: `result["alice"].require().save("alice")`."""
        if self.prefix is not None:
            return self.prefix
        kind = DataError if self.status == "too_few" else PTuningError
        raise kind(
            "the user has no prefix",
            seen=f"{self.status}: {self.error}",
            expected="a user who was trained",
            fix="mend what the reason names, or ask for `prefix`, which may be None",
        )


Results = Generator[tuple[str, TuneResult], None, None]


@dataclass(frozen=True)
class _Task:
    """What one call of `iter_tune` was asked for."""

    backbone: Backbone
    recipe: Recipe
    data: DataConfig
    columns: Columns
    salt: bytes
    start: Mapping[str, Prefix]
    resume: Mapping[str, Resume]


def tune(
    backbone: Backbone,
    users: Users,
    *,
    method: Method | None = None,
    train: TrainConfig | None = None,
    data: DataConfig | None = None,
    artifact: ArtifactConfig | None = None,
    prefix_name: str = "default",
    salt: bytes = b"",
    start: Mapping[str, Prefix] | None = None,
    resume: Mapping[str, Resume] | None = None,
) -> dict[str, TuneResult]:
    """Train one prefix per user, many users in one forward pass: all results of `iter_tune`, in
    the order of `users`.

    Raises as `iter_tune` does, and then has no results; for many users, take them from there as
    they finish.
    """
    if is_frame(users):
        users = frame_users(users, Columns((data or DataConfig()).columns))
    ids = [_text_of(user_id) for user_id in users]
    if doubled := [user_id for user_id, count in Counter(ids).items() if count > 1]:
        raise ConfigError(
            "two of the users have one id",
            seen=", ".join(sorted(doubled)[:3]),
            expected="ids that differ as text: a number is taken as its decimal text",
            fix="put the user's rows together, or rename one of them",
        )
    found = dict(
        iter_tune(
            backbone,
            users,
            method=method,
            train=train,
            data=data,
            artifact=artifact,
            prefix_name=prefix_name,
            salt=salt,
            start=start,
            resume=resume,
        )
    )
    return {user_id: found[user_id] for user_id in ids}


def iter_tune(
    backbone: Backbone,
    users: Users | Iterable[tuple[UserId, Iterable[Row] | Frame]],
    *,
    method: Method | None = None,
    train: TrainConfig | None = None,
    data: DataConfig | None = None,
    artifact: ArtifactConfig | None = None,
    prefix_name: str = "default",
    salt: bytes = b"",
    start: Mapping[str, Prefix] | None = None,
    resume: Mapping[str, Resume] | None = None,
) -> Results:
    """Train one prefix per user, and yield `(user_id, result)` whenever a pack is done.

    `users` maps ids to rows, or is a stream of such pairs, each user once; it is read a pack
    (`train.pack_users`) at a time, and no more than one pack is in memory. It may also be a table
    of everybody's rows with a column `user_id` (a DataFrame, a pyarrow Table). A user's rows are
    Examples, mappings, read like rows of a file, or a table of them; without a split they are
    split by time (DataConfig). Every user of `users` is yielded once; one whose rows cannot be
    used fails alone.

    Users in `start` begin from a trained prefix of the same method and sizes, users in `resume`
    where an earlier training on the same rows stopped (TuneResult.resume); each user's must be
    their own. `salt` is of the store that prefixes go to, if they go to one: a user's key depends
    on it. Of `data`, `columns`, `max_length`, `max_rows` and `min_examples` count; the template is
    the backbone's.

    Raises MethodError where the backbone cannot do the method, ConfigError where `start` or
    `resume` name nobody who is trained, DataError on an id that is none, and BackboneChanged where
    the weights are not the same after a pack as before. What was yielded until then is whole.

        for user_id, result in ptuning.iter_tune(backbone, read_users()):
            if result.prefix is not None:
                result.prefix.save(f"{ptuning.user_key(user_id)}.safetensors")
    """
    data = data or DataConfig()
    recipe = Recipe(
        method or default_method(),
        train or TrainConfig(),
        data.max_length,
        prefix_name,
        artifact or ArtifactConfig(),
    )
    recipe.method.check(backbone.facts)
    check_init_text(backbone.template, recipe.method)
    _check_beginnings(recipe, start or {}, resume or {})
    columns = Columns(data.columns)
    task = _Task(backbone, recipe, data, columns, salt, start or {}, resume or {})
    if is_frame(users):
        users = frame_users(users, columns)
    if isinstance(users, Mapping):
        _check_strangers(task, {_text_of(user_id) for user_id in users})
        return _tune_stream(task, iter(users.items()))
    return _check_stream(task, iter(users))


def _check_stream(task: _Task, users: Iterator[tuple[UserId, Iterable[Row] | Frame]]) -> Results:
    """`_tune_stream`, which only at its end knows who was not there."""
    wanted = {*task.start, *task.resume}
    met = set()
    for user_id, result in _tune_stream(task, users):
        if user_id in wanted:
            met.add(user_id)
        yield user_id, result
    _check_strangers(task, met)


def _tune_stream(task: _Task, users: Iterator[tuple[UserId, Iterable[Row] | Frame]]) -> Results:
    size = task.recipe.train.pack_users
    before = task.backbone.checksum()
    ready = _read_users(task, users)
    while chunk := list(islice(ready, size)):
        pack = [(user_id, read) for user_id, read in chunk if isinstance(read, PackUser)]
        yield from [(user_id, read) for user_id, read in chunk if isinstance(read, TuneResult)]
        if not pack:
            continue
        machine = run_pack(task.backbone, task.recipe, [user for _, user in pack])
        results = LocalDriver(task.backbone).run(machine)
        task.backbone.verify_unchanged(before)
        for (user_id, _), result in zip(pack, results, strict=True):
            yield user_id, _describe(result)


def _read_users(
    task: _Task, users: Iterator[tuple[UserId, Iterable[Row] | Frame]]
) -> Iterator[tuple[str, PackUser | TuneResult]]:
    """Each user as they are trained, or why they are not."""
    for given, rows in users:
        user_id = _text_of(given)
        try:
            yield user_id, _read_user(task, read_user_id(user_id), rows)
        except (PTuningError, UnicodeError) as error:  # UnicodeError: text that is no Unicode
            yield user_id, TuneResult(status="failed", error=str(error))


def _text_of(user_id: UserId) -> str:
    """An id as text. A text is left as it is: if it is none, its user fails, and nobody else."""
    return user_id if isinstance(user_id, str) else read_user_id(user_id)


def _read_user(task: _Task, user_id: str, rows: Iterable[Row] | Frame) -> PackUser | TuneResult:
    if is_frame(rows):
        rows = frame_rows(rows)
    examples = [
        example for row in rows if (example := _read_row(task.columns, user_id, row)) is not None
    ]
    if too_few(arranged := arrange(examples), task.data.min_examples):
        return TuneResult(status="too_few", error=why_too_few(arranged, task.data.min_examples))
    return PackUser(
        user_key=user_key(user_id, task.salt),
        examples=arrange(examples, task.data.max_rows),
        start=task.start.get(user_id),
        resume=task.resume.get(user_id),
    )


def _read_row(columns: Columns, user_id: str, row: Row) -> Example | None:
    """A row as an Example; None: its weight is 0, so it is not learned from. Raises DataError."""
    if not isinstance(row, Mapping):
        check_example(row)
        return row
    if "user_id" in row and read_user_id(row["user_id"]) != user_id:
        raise DataError(
            "a row names another user than the one it is given for",
            seen=repr(row["user_id"]),
            expected=repr(user_id),
            fix="give each user their own rows only",
        )
    read = check_row(row, columns, {"user_id": user_id})
    return read.example if read.learned else None


def _describe(result: PackResult) -> TuneResult:
    return TuneResult(
        status="failed" if result.prefix is None else "trained",
        prefix=result.prefix,
        history=result.history,
        steps=result.steps,
        tokens=result.tokens,
        resets=result.resets,
        error=result.error,
        resume=result.resume,
    )


def _check_beginnings(
    recipe: Recipe, start: Mapping[str, Prefix], resume: Mapping[str, Resume]
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
        if nothing := sorted(user for user, begin in given.items() if begin is None):
            raise ConfigError(
                f"{name} has nothing to begin from",
                seen=f"None for {', '.join(nothing[:3])}",
                expected="a Prefix in start, a Resume in resume",
                fix="leave the user out; TuneResult.resume is kept with train.keep_resume=True",
            )


def _check_strangers(task: _Task, known: set[str]) -> None:
    """Raise ConfigError where `start` or `resume` names somebody who is not among the users."""
    beginnings: dict[str, Mapping[str, object]] = {"start": task.start, "resume": task.resume}
    for name, given in beginnings.items():
        if strangers := sorted({*given} - known):
            raise ConfigError(
                f"{name} names users who are not trained",
                seen=", ".join(strangers[:3]),
                expected="user ids of `users`",
                fix=f"correct the ids in {name}, or leave them out",
            )
