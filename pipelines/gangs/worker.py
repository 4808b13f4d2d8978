"""Run one pack on a worker: read its users' rows, champions and training states from the store, run
`ptuning.pack`, write its files to the store, and report on each user. Nothing is committed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.plan import Pack, PlannedUser
from pipelines.report.metrics import worker_metrics
from pipelines.rows.gather import read_users
from ptuning.errors import ArtifactError, PTuningError
from ptuning.identity import Recipe
from ptuning.model.backbone import Backbone
from ptuning.pack import PackResult, PackUser, run_pack
from ptuning.prefix.artifact import Prefix
from ptuning.store import Store, prefix_path, resume_path
from ptuning.train.resume import Resume
from ptuning.train.step import Machine
from ptuning.types import Example, UserReport


@dataclass(frozen=True)
class PackJob:
    """What a worker needs besides the pack: the store, the folder of the run's rows, and how to
    train."""

    store: Store
    rows: str
    recipe: Recipe


@dataclass(frozen=True)
class StoreKeeper:
    """Writes prefixes and training states to a store."""

    store: Store

    def keep_prefix(self, user_key: str, digest: str, data: bytes) -> None:
        self.store.write(prefix_path(user_key, digest), data)

    def keep_resume(self, user_key: str, digest: str, data: bytes) -> None:
        self.store.write(resume_path(user_key, digest), data)


def pack_machine(
    backbone: Backbone,
    job: PackJob,
    pack: Pack,
    on_trained: Callable[[str], None] | None = None,
) -> Machine[list[UserReport]]:
    """Train and score every user of a pack; prefix files are written, nothing is committed.
    `on_trained` is told each user's key when that user's training ends."""
    reports = {
        user.user_key: UserReport(user_key=user.user_key, status="trained") for user in pack.users
    }
    users = _read_pack(backbone, job, pack.users, reports)
    results = yield from run_pack(
        backbone, job.recipe, users, StoreKeeper(job.store), score=True, on_trained=on_trained
    )
    planned = {user.user_key: user for user in pack.users}
    for result in results:
        _fill_report(reports[result.user_key], result, planned[result.user_key])
    return list(reports.values())


def _fail(report: UserReport, error: object) -> None:
    report.status, report.stage, report.error = "failed", "tune", str(error)


def _read_pack(
    backbone: Backbone,
    job: PackJob,
    planned: Sequence[PlannedUser],
    reports: dict[str, UserReport],
) -> list[PackUser]:
    """Read every user's data from the store, matched by key. A user who cannot be read fails
    without affecting the others."""
    try:
        rows = read_users(job.store, job.rows, [user.user_key for user in planned])
    except (PTuningError, OSError):
        rows = None  # then users are read one by one, so that only the bad ones fail
    users = []
    for user in planned:
        report, key = reports[user.user_key], user.user_key
        try:
            found = read_users(job.store, job.rows, [key]) if rows is None else rows
            users.append(_read_user(backbone, job, user, found[key], report))
        except (PTuningError, OSError) as error:
            _fail(report, error)
    return users


def _read_user(
    backbone: Backbone,
    job: PackJob,
    planned: PlannedUser,
    examples: Sequence[Example],
    report: UserReport,
) -> PackUser:
    champion = _read_champion(backbone, job, planned, report)
    start = job.recipe.train.start
    return PackUser(
        user_key=planned.user_key,
        examples=examples,
        start=champion if start == "champion" else None,
        resume=_read_resume(job, planned, report) if start == "resume" else None,
        otherwise="init",
        planned=planned.training_digest,
        champion=champion,
    )


def _read_champion(
    backbone: Backbone, job: PackJob, planned: PlannedUser, report: UserReport
) -> Prefix | None:
    """The user's current champion, if this backbone can use it."""
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
        # The service cannot use it either. Other errors may be transient: they fail the user.
        report.details["champion_ignored"] = str(error)
        return None


def _read_resume(job: PackJob, planned: PlannedUser, report: UserReport) -> Resume | None:
    """The training state of the candidate, if it was kept and is intact."""
    if planned.candidate_digest is None:
        return None
    path = resume_path(planned.user_key, planned.candidate_digest)
    try:
        return Resume.from_bytes(job.store.read(path))
    except (ArtifactError, FileNotFoundError) as error:
        report.details["start_ignored"] = str(error)
        return None


def _fill_report(report: UserReport, result: PackResult, planned: PlannedUser) -> None:
    report.history, report.steps, report.tokens = result.history, result.steps, result.tokens
    report.counts, report.losses = result.counts, result.losses
    report.measured = worker_metrics(result)
    notes = {
        "resets": result.resets,
        "start_ignored": result.start_ignored,
        "champion_ignored": result.champion_ignored,
        "test_rows_too_long": result.test_rows_too_long,
        "started_from": "" if result.resumed else result.started_from,
        "continued_from": planned.candidate_digest if result.resumed else "",
    }
    report.details |= {name: note for name, note in notes.items() if note}
    if result.prefix is None:
        _fail(report, result.error)
    else:
        report.digest = result.prefix.digest
