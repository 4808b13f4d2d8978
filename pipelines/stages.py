"""The stages of a run: each takes values, commits its results, and returns values."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from pipelines.candidates.judge import gate_all
from pipelines.candidates.lost import find_lost
from pipelines.candidates.publish import deploy
from pipelines.candidates.register import (
    Lineage,
    hold,
    hold_overtaken,
    register_pack,
    retire_users,
)
from pipelines.candidates.rejudge import find_losses, records_of
from pipelines.gangs import cluster
from pipelines.gangs.places import all_places, check_room
from pipelines.opening import Run
from pipelines.plan import IndexRow, Pack, Plan, Rules, plan_users
from pipelines.report.metrics import pack_metrics
from pipelines.rows.gather import is_gathered
from pipelines.rows.partition import gather_users
from pipelines.rows.ray_tasks import Progress as RowProgress
from pipelines.rows.stored import iterate_users
from ptuning.champions import ChampionRef
from ptuning.errors import RunError
from ptuning.identity import BackboneIdentity, digest_training
from ptuning.registry.base import Current, PackRecord, Registry
from ptuning.types import UserReport

Progress = Callable[[int, int], None]  # users done, tokens trained
_CHUNK = 1000  # users per query to the registry


def read_rows(run: Run) -> list[IndexRow]:
    """The partition's users, by id."""
    tables = iterate_users(run.store, run.part)
    rows = [IndexRow.of(values) for table in tables for values in table.to_pylist()]
    return sorted(rows, key=lambda row: row.user_id)


def plan_run(run: Run, registry: Registry, rows: list[IndexRow]) -> Plan:
    """Decide what to do with each user; a resumed run keeps its plan.

    The losses of users who are only judged again are copied into this run's records, so that the
    plan can be completed whatever happens to the older run.
    """
    if (plan := run.folder.read_plan()) is not None:
        return plan
    rules, name = _rules(run), run.config.registry.prefix_name
    keys = [row.user_key for row in rows]
    plan = plan_users(
        _with_current(registry, rows, name),
        registry.with_champion(name),
        rules,
        find_lost(run.store, registry, keys, name, seed=run.run_id),
    )
    judged = [user.user_key for pack in plan.judged for user in pack.users]
    losses = find_losses(run.store, plan.judged)
    plan = plan.train_instead([key for key in judged if key not in losses], rules)
    for record in records_of(plan.judged, losses):
        gate_all(record.reports, run.config.gate)
        run.folder.commit(record)
    plan = replace(plan, planned_at=time.time_ns() // 1_000_000)
    run.folder.write_plan(plan)
    return plan


def _rules(run: Run) -> Rules:
    config = run.config
    nodes, wanted = cluster.cluster_nodes(), cluster.wanted_workers(config)
    check_room(nodes, wanted)
    workers = sum(place.workers for place in all_places(nodes, wanted))
    backbone = BackboneIdentity(
        run.backbone.fingerprint, config.backbone.dtype, run.backbone.template_digest
    )

    def training_digest(user_key: str, data_digest: str) -> str:
        return digest_training(run.recipe, backbone, user_key, data_digest)

    return Rules(
        identity=training_digest,
        gate_digest=gate_digest(run),
        pack_users=config.train.pack_users,
        workers=workers,
        on_shrink=config.data.on_shrink,
        max_shrink=config.data.max_shrink,
        everybody=config.data.max_users is None,
    )


def gate_digest(run: Run) -> str:
    """SHA-256 of the gate's settings; if they change, prefixes are judged again."""
    return hashlib.sha256(run.config.gate.model_dump_json().encode()).hexdigest()


def _with_current(
    registry: Registry, rows: list[IndexRow], prefix_name: str
) -> Iterator[tuple[IndexRow, Current | None]]:
    """Each row with the user's versions in the registry, queried in chunks."""
    left = iter(rows)
    while chunk := list(islice(left, _CHUNK)):
        current = registry.current([row.user_key for row in chunk], prefix_name)
        for row in chunk:
            yield row, current.get(row.user_key)


def gather(run: Run, plan: Plan, rows: Sequence[IndexRow], progress: RowProgress) -> None:
    """Bring the rows of the users who train together, unless all of them are done."""
    settled = run.folder.settled_packs()
    todo = any(pack.pack_id not in settled for pack in run.folder.unfold(plan.packs))
    if not todo or is_gathered(run.store, run.folder.rows):
        return
    counts = {row.user_key: sum(row.rows.values()) for row in rows}
    keys = sorted(user.user_key for pack in plan.packs for user in pack.users)
    users = [(key, counts[key]) for key in keys]
    gather_users(run.store, run.part, users, run.folder.rows, progress)


def train(
    run: Run,
    plan: Plan,
    progress: Progress,
    note: Callable[[str], None],
    on_commit: Callable[[Pack], None],
) -> None:
    """Train every pack of the plan that has no record yet. `note` is called with a line whenever
    a training worker died, `on_commit` with each pack of the plan when it is done."""
    if not plan.packs:
        return
    from pipelines.gangs.supervise import tune
    from pipelines.gangs.train import Expected, GangTask, package_versions

    task = GangTask(
        store=run.store.root,
        run_id=run.run_id,
        recipe=run.recipe,
        gate=run.config.gate,
        backbone=run.config.backbone,
        template=run.config.data.template,
        expected=Expected(
            package_versions(), run.backbone.fingerprint, run.backbone.template_digest
        ),
        timeout_s=run.config.ray.timeout_s,
    )
    packs = {pack.pack_id: pack for pack in plan.packs}

    def committed(pack_id: str) -> None:
        if (pack := packs.get(pack_id)) is not None:  # parts of split packs are found at the end
            on_commit(pack)

    wanted, failures = cluster.wanted_workers(run.config), run.config.ray.max_failures
    tune(run.folder, plan.packs, task, wanted, failures, progress, note, committed)


class Registrar:
    """Registers the packs of a run, each once, and keeps the reports on their users."""

    def __init__(self, run: Run, plan: Plan, registry: Registry) -> None:
        self._run, self._plan, self._registry = run, plan, registry
        self._registered = run.folder.registered_packs()
        self._seen: set[str] = set()
        self.reports: dict[str, UserReport] = {}
        self.evaluate_seconds = 0.0  # of all workers together

    def all_packs(self) -> list[Pack]:
        """The packs that were trained, and those that are only judged. A pack that was split is
        there as its parts."""
        return [*self._run.folder.unfold(self._plan.packs), *self._plan.judged]

    def register(self, pack: Pack) -> int:
        """Register a pack's decisions; returns the number of its users. Raises RunError if it has
        no done-record."""
        if pack.pack_id in self._seen:
            return 0
        record = self._run.folder.read_done(pack.pack_id)
        if record is None:
            raise RunError(
                "training ended without a record of every pack",
                seen=f"no record of pack {pack.pack_id}",
                fix="run the same command again; what is committed is kept",
            )
        reports = list(record.reports)
        if pack.pack_id in self._registered:
            held = self._run.folder.read_held(pack.pack_id)
            for report in reports:
                if report.user_key in held:
                    hold(report, held[report.user_key])
        else:
            self._register(pack, reports)
        self.reports |= {report.user_key: report for report in reports}
        self.evaluate_seconds += record.evaluate_seconds
        self._seen.add(pack.pack_id)
        return len(reports)

    def _register(self, pack: Pack, reports: list[UserReport]) -> None:
        run, name = self._run, self._run.config.registry.prefix_name
        planned = {user.user_key: user for user in pack.users}
        overtaken = hold_overtaken(self._registry, name, reports, planned)
        register_pack(
            self._registry,
            _pack_record(run, self._plan, pack, reports),
            [report for report in reports if report.user_key not in overtaken],
            planned,
            _lineage(run),
        )
        held = {
            report.user_key: report.gate.reason
            for report in reports
            if report.decision == "pending" and report.gate is not None
        }
        run.folder.write_registered(pack.pack_id, held)


def _pack_record(run: Run, plan: Plan, pack: Pack, reports: list[UserReport]) -> PackRecord:
    return PackRecord(
        run_id=run.run_id,
        pack_id=pack.pack_id,
        planned_at=plan.planned_at,
        params=_params(run),
        metrics=pack_metrics(reports),
    )


def _params(run: Run) -> dict[str, str]:
    sections = run.config.model_dump(mode="json", include={"method", "train", "gate", "backbone"})
    return {
        f"{section}.{key}": str(value)
        for section, values in sections.items()
        for key, value in values.items()
    }


def _lineage(run: Run) -> Lineage:
    """The lineage shared by all prefixes that this run registers."""
    return Lineage(
        prefix_name=run.config.registry.prefix_name,
        template_digest=run.backbone.template_digest,
        gate_digest=gate_digest(run),
        tags={
            "backbone": run.backbone.backbone_name,
            "config_digest": run.config_digest,
            "method": run.config.method.type,
            "partition_id": run.part.partition_id,
        },
    )


def publish(
    run: Run, plan: Plan, registry: Registry, reports: Mapping[str, UserReport]
) -> list[str]:
    """Publish the run's decisions to the service: new champions, and the base model for users whose
    rows are gone. Returns the replicas that do not serve the new list yet.

    The current champions in the registry are published, so that a run that was resumed, or
    overtaken by a newer one, publishes nothing that is out of date.
    """
    name = run.config.registry.prefix_name
    retired = retire(run, plan, registry)
    promoted = sorted(key for key, report in reports.items() if report.decision == "promoted")
    changes: dict[tuple[str, str], ChampionRef | None] = {(key, name): None for key in retired}
    for start in range(0, len(promoted), _CHUNK):
        for key, now in registry.current(promoted[start : start + _CHUNK], name).items():
            if now.champion is not None:
                changes[key, name] = ChampionRef(now.champion.digest, now.champion.version)
    refresh_seconds = run.config.serve.refresh_seconds
    _, late = deploy(run.store, run.backbone.fingerprint, changes, refresh_seconds)
    return late


def retire(run: Run, plan: Plan, registry: Registry) -> list[str]:
    """Remove the champions of users whose rows are gone; returns the users' keys."""
    retired = []
    for start in range(0, len(plan.retired), _CHUNK):
        keys = plan.retired[start : start + _CHUNK]
        name = run.config.registry.prefix_name
        retired += retire_users(registry, keys, name, plan.planned_at)
    return retired


def outcomes(plan: Plan, reports: Mapping[str, UserReport]) -> dict[str, UserReport]:
    """The run's report on every user, by key.

    A user who was only judged again is `unchanged`, since nothing was trained. Their decision is in
    the table and is counted in `judged_again`, not in promoted, rejected and pending, which must
    add up to the trained users.
    """
    found = {
        key: UserReport(user_key=key, status=status) for key, status in plan.skipped.items()
    } | dict(reports)
    for pack in plan.judged:
        for user in pack.users:
            report = found[user.user_key]
            found[user.user_key] = replace(
                report, status="unchanged", steps=0, tokens=0, history=[]
            )
    return found
