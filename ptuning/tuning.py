"""Tune users in this process: the library's entry point, without a cluster."""

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

UserId = str | int  # a number stands for its decimal text
Row = Example | Mapping[str, object]  # a mapping is read like a row of a file: data.columns
# By UserId (Any because keys of mappings are invariant), or a table with the rows of all users: a
# DataFrame of pandas or polars, a Table of pyarrow.
Users = Mapping[Any, Iterable[Row] | Frame] | Frame


@dataclass(frozen=True, kw_only=True, repr=False)
class TuneResult:
    """The outcome for one user. `prefix` is None unless `status` is "trained".

    `tokens` counts the real tokens trained on; `resets` counts restarts at a lower learning rate
    after a loss that was not finite.
    """

    status: Literal["trained", "too_few", "failed"]
    prefix: Prefix | None = None
    history: list[EpochLoss] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    resets: int = 0
    error: str | None = None
    resume: Resume | None = None  # continues the training; set with train.keep_resume

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
        """The prefix. Raises DataError if the user has too few rows and PTuningError if they
        failed, with the reason. Example: `result["alice"].require().save("alice")`."""
        if self.prefix is not None:
            return self.prefix
        error_type = DataError if self.status == "too_few" else PTuningError
        raise error_type(
            "the user has no prefix",
            seen=f"{self.status}: {self.error}",
            expected="a user who was trained",
            fix="fix the cause, or use `prefix`, which may be None",
        )


Results = Generator[tuple[str, TuneResult], None, None]


@dataclass(frozen=True)
class _Task:
    """The arguments of one call of `iter_tune`, with defaults filled in."""

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
    """Train one prefix per user, many users in one forward pass, and return the results of
    `iter_tune` in the order of `users`.

    Raises what `iter_tune` raises, and then all results are lost. For many users, call `iter_tune`
    and take results as they finish.

        result = ptuning.tune(backbone, {"alice": [ptuning.Example(prompt="…", completion="…"), …]})
        result["alice"].require().save("alice.safetensors")
    """
    if is_frame(users):
        users = frame_users(users, Columns((data or DataConfig()).columns))
    ids = [_text_of(user_id) for user_id in users]
    if doubled := [user_id for user_id, count in Counter(ids).items() if count > 1]:
        raise ConfigError(
            "two of the users have the same id",
            seen=", ".join(sorted(doubled)[:3]),
            expected="ids that differ as text: a number stands for its decimal text",
            fix="merge their rows, or rename one of them",
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
    """Train one prefix per user, and yield `(user_id, result)` as packs finish.

    `users` maps ids to rows, or is a stream of such pairs with each user once. It is read one pack
    (`train.pack_users`) at a time, and only one pack is in memory. `users` may also be a table with
    a column `user_id` (a DataFrame, a pyarrow Table). A user's rows are Examples, mappings that are
    read like rows of a file, or a table; rows without splits are split by time (DataConfig). Every
    user is yielded once; a user whose rows cannot be used fails without affecting the others.

    Users in `start` start from a trained prefix with the same method and sizes. Users in `resume`
    continue an earlier training on the same rows (TuneResult.resume). Both must be the user's.
    `salt` is the salt of the store that the prefixes are for, if any: user keys depend on it. Of
    `data` only `columns`, `max_length`, `max_rows` and `min_examples` are used; the template is the
    backbone's.

    Raises MethodError if the backbone does not support the method, ConfigError if `start` or
    `resume` name users that are not in `users`, DataError for an invalid id, and BackboneChanged if
    a pack changed the weights. Results yielded before an error are valid.

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
    _check_starts(recipe, start or {}, resume or {})
    columns = Columns(data.columns)
    task = _Task(backbone, recipe, data, columns, salt, start or {}, resume or {})
    if is_frame(users):
        users = frame_users(users, columns)
    if isinstance(users, Mapping):
        _check_unknown(task, {_text_of(user_id) for user_id in users})
        return _tune_stream(task, iter(users.items()))
    return _check_stream(task, iter(users))


def _check_stream(task: _Task, users: Iterator[tuple[UserId, Iterable[Row] | Frame]]) -> Results:
    """`_tune_stream`, with the check of `start` and `resume` at the end of the stream, when all
    users are known."""
    wanted = {*task.start, *task.resume}
    found = set()
    for user_id, result in _tune_stream(task, users):
        if user_id in wanted:
            found.add(user_id)
        yield user_id, result
    _check_unknown(task, found)


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
    """Each user's input to the training, or a result that says why there is none."""
    for given, rows in users:
        user_id = _text_of(given)
        try:
            yield user_id, _read_user(task, read_user_id(user_id), rows)
        except (PTuningError, UnicodeError) as error:  # UnicodeError: text is not valid Unicode
            yield user_id, TuneResult(status="failed", error=str(error))


def _text_of(user_id: UserId) -> str:
    """An id as text. Text is not checked here: if it is not a valid id, only that user fails."""
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
    """A row as an Example; None if its weight is 0, so it is not trained on. Raises DataError."""
    if not isinstance(row, Mapping):
        check_example(row)
        return row
    if "user_id" in row and read_user_id(row["user_id"]) != user_id:
        raise DataError(
            "a row names a user other than the one it was given for",
            seen=repr(row["user_id"]),
            expected=repr(user_id),
            fix="give each user only the rows of that user",
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


def _check_starts(
    recipe: Recipe, start: Mapping[str, Prefix], resume: Mapping[str, Resume]
) -> None:
    """Raise ConfigError if a requested start would be ignored."""
    if recipe.train.start != "init":
        raise ConfigError(
            "train.start is for runs, which know each user's champion and saved training states",
            seen=f"train.start={recipe.train.start}",
            expected="train.start=init",
            fix="pass the prefixes as `start`, or the training states as `resume`",
        )
    starts: dict[str, Mapping[str, object]] = {"start": start, "resume": resume}
    for name, given in starts.items():
        if missing := sorted(user for user, value in given.items() if value is None):
            raise ConfigError(
                f"{name} has nothing to begin from",
                seen=f"None for {', '.join(missing[:3])}",
                expected="a Prefix in start, a Resume in resume",
                fix="omit the user; TuneResult.resume is set with train.keep_resume=True",
            )


def _check_unknown(task: _Task, known: set[str]) -> None:
    """Raise ConfigError if `start` or `resume` names somebody who is not among the users."""
    starts: dict[str, Mapping[str, object]] = {"start": task.start, "resume": task.resume}
    for name, given in starts.items():
        if unknown := sorted({*given} - known):
            raise ConfigError(
                f"{name} names users who are not trained",
                seen=", ".join(unknown[:3]),
                expected="user ids of `users`",
                fix=f"correct the ids in {name}, or omit them",
            )
