"""The run: partition, plan, tune, evaluate, register, deploy. Resumes what was begun.

What is done is read from what is committed (the partition's record, done-records, the
registry); a run without a summary.json is unfinished and is taken up again by the next
`ptuning run` with the same inputs and configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq
import yaml

from pipelines.candidates.judge import gate_all
from pipelines.candidates.publish import deploy
from pipelines.candidates.register import hold_overtaken, pack_metrics, register_pack
from pipelines.config import RunConfig
from pipelines.gangs import cluster
from pipelines.plan import Plan, PlannedUser, make_packs
from pipelines.report.page import html_report
from pipelines.report.progress import RunProgress
from pipelines.report.summary import RunFacts, summary, users_table
from pipelines.rows.inputs import find_files
from pipelines.rows.partition import Partition, partition, read_index
from ptuning.errors import RunError
from ptuning.model.load import load_template, outline
from ptuning.registry import open_registry, registry_uri
from ptuning.registry.base import Current, PackRecord, Registry
from ptuning.store import Store, read_uri
from ptuning.types import UserReport
from ptuning.users import Recipe, check_init_text, identity


@dataclass
class Run:
    """One run's fixed facts and what its stages have found so far."""

    run_id: str
    store: Store
    config: RunConfig
    part: Partition
    recipe: Recipe
    fingerprint: str
    template_digest: str
    backbone_name: str
    config_digest: str
    index: list[dict[str, Any]] = field(default_factory=list)
    plan: Plan = field(default_factory=Plan)
    reports: dict[str, UserReport] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    resumed: bool = False

    def name(self, *parts: str) -> str:
        return "/".join(["runs", self.run_id, *parts])

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - begin


def execute(
    sources: Sequence[str], store: Store, config: RunConfig, progress: RunProgress
) -> RunFacts:
    """Run every stage and write the run's results; returns what the end report prints."""
    begun = time.monotonic()
    # What can be known to be wrong is said before a cluster is started.
    find_files(sources)
    config.method.check(outline(config.backbone.name))
    if config.method.init_text is not None:
        check_init_text(load_template(config.backbone.name, config.data.template), config.method)
    registry_uri(config.registry, store)
    _check_writable(store)
    with cluster.session(config.ray) as start_seconds:
        start = time.monotonic()
        part = partition(
            sources, store, config.data, config.backbone.name, progress=_rows_of(progress)
        )
        partition_seconds = time.monotonic() - start
        with _open_run(store, config, part) as run:
            run.seconds = {"start": start_seconds, "partition": partition_seconds}
            facts = _stages(run, progress, begun)
    return facts


def _stages(run: Run, progress: RunProgress, begun: float) -> RunFacts:
    with run.timed("plan"):
        registry = open_registry(run.config.registry, registry_uri(run.config.registry, run.store))
        _plan(run, registry)
    with run.timed("tune"):
        _tune(run, progress)
    with run.timed("evaluate"):
        gate_all(run.reports.values(), run.config.gate)
    with run.timed("register"):
        _register(run, registry, progress)
    with run.timed("deploy"):
        deploy(registry, _promoted(run), run.config.registry.prefix_name)
    run.seconds["total"] = time.monotonic() - begun
    return _finish(run)


def _rows_of(progress: RunProgress) -> Any:
    """The partition's steps as one progress line each."""
    shown = ""

    def report(step: str, done: int, total: int) -> None:
        nonlocal shown
        if step != shown:
            unit = "tasks" if total else "rows"
            progress.stage(f"partition: {step}", total or None, unit=unit)
            shown = step
        progress.update(done)

    return report


def _check_writable(store: Store) -> None:
    """Before hours of work, not after."""
    try:
        store.write(".writable", b"")
        store.remove(".writable")
    except OSError as error:
        raise RunError(
            "the store cannot be written", seen=str(error), fix="give --store a writable place"
        ) from error


@contextlib.contextmanager
def _open_run(store: Store, config: RunConfig, part: Partition) -> Iterator[Run]:
    """The unfinished run with the same partition and configuration, else a new one; locked."""
    known = cluster.backbone_identity(config)
    header = {
        "partition_id": part.partition_id,
        # Of what was asked for: "auto" may be decided otherwise next time.
        "config_digest": config.digest(),
        "fingerprint": known["fingerprint"],
        "template_digest": known["template_digest"],
    }
    run_id = _unfinished(store, header)
    resumed = run_id is not None
    if run_id is None:
        run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        config = cluster.resolve(config)
    else:
        config = _as_begun(store, run_id, config)
    run = Run(
        run_id=run_id,
        store=store,
        config=config,
        part=part,
        recipe=Recipe(
            config.method,
            config.train,
            config.data.max_length,
            config.registry.prefix_name,
            config.artifact.dtype,
            config.gate.min_valid_tokens,
        ),
        resumed=resumed,
        config_digest=header["config_digest"],
        **known,
    )
    with _lock(store, run_id):
        if not resumed:
            text = yaml.safe_dump(header) + config.to_yaml()
            store.write(run.name("config.yaml"), text.encode("utf-8"))
        yield run


def _as_begun(store: Store, run_id: str, config: RunConfig) -> RunConfig:
    """The configuration with the dtype and attention that the run was begun with."""
    saved = yaml.safe_load(store.read(f"runs/{run_id}/config.yaml"))["backbone"]
    decided = {"dtype": saved["dtype"], "attention": saved["attention"]}
    return config.model_copy(update={"backbone": config.backbone.model_copy(update=decided)})


def _unfinished(store: Store, wanted: dict[str, str]) -> str | None:
    """The newest run without a summary that was begun with the same header."""
    for run_id in reversed(store.list("runs")):
        name = f"runs/{run_id}/config.yaml"
        if store.exists(f"runs/{run_id}/summary.json") or not store.exists(name):
            continue
        header = yaml.safe_load(store.read(name))
        if {key: header.get(key) for key in wanted} == wanted:
            return run_id
    return None


@contextlib.contextmanager
def _lock(store: Store, run_id: str) -> Iterator[None]:
    """Only one driver per run on one host; the kernel drops the lock when the driver dies."""
    if not store.is_local:
        yield
        return
    import fcntl

    os.makedirs(store.path("runs", run_id), exist_ok=True)
    with open(store.path("runs", run_id, "lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                "another process is working on this run",
                seen=run_id,
                fix="wait for it, or stop it and run again",
            ) from error
        yield


def _plan(run: Run, registry: Registry) -> None:
    """Decide who trains, from the index and the registry; a resumed run keeps its plan."""
    run.index = read_index(run.store, run.part.partition_id).to_pylist()
    if run.store.exists(run.name("plan.json")):
        run.plan = Plan.from_json(run.store.read_json(run.name("plan.json")))
        return
    current = registry.current(
        [row["user_key"] for row in run.index], run.config.registry.prefix_name
    )
    skipped: dict[str, Any] = {}
    gate, users = _gate_digest(run), []
    for row in run.index:
        key = row["user_key"]
        if row["too_few"]:
            skipped[key] = "too_few"
            continue
        digest = identity(run.recipe, run.fingerprint, run.template_digest, key, row["data_digest"])
        now = current.get(key)
        if now and _is_unchanged(now, digest, gate):
            skipped[key] = "unchanged"
            continue
        champion = now.champion if now else None
        users.append(
            PlannedUser(
                user_key=key,
                bucket=row["bucket"],
                tokens=row["supervised_tokens"],
                data_digest=row["data_digest"],
                training_digest=digest,
                champion_uri=champion.uri if champion else None,
                champion_digest=champion.digest if champion else None,
                candidate_digest=now.candidate.digest if now and now.candidate else None,
            )
        )
    workers = cluster.gang(run.config).workers
    run.plan = Plan(packs=make_packs(users, run.config.train.pack_users, workers), skipped=skipped)
    run.store.write_json(run.name("plan.json"), run.plan.to_json())


def _is_unchanged(now: Current, training: str, gate: str) -> bool:
    """Whether the candidate is what training would give, judged by this gate, and its file and
    the champion's are still what they were: a lost or damaged one is trained again."""
    candidate = now.candidate
    if candidate is None or (candidate.training_digest, candidate.gate_digest) != (training, gate):
        return False
    for version in {candidate, now.champion or candidate}:
        try:
            if hashlib.sha256(read_uri(version.uri)).hexdigest() != version.digest:
                return False
        except OSError:
            return False
    return True


def _gate_digest(run: Run) -> str:
    """SHA-256 of the gate's settings: a prefix judged by others is judged again."""
    return hashlib.sha256(run.config.gate.model_dump_json().encode()).hexdigest()


def _tune(run: Run, progress: RunProgress) -> None:
    keys = {row["user_key"] for row in run.index}
    run.reports = {
        key: UserReport(user_key=key, status=status)
        for key, status in run.plan.skipped.items()
        if key in keys
    }
    total = sum(len(pack.users) for pack in run.plan.packs)
    if total:
        from pipelines.gangs.train import GangTask, read_done, tune

        progress.stage("tune", total)
        shape = cluster.gang(run.config)
        task = GangTask(
            store=run.store.root,
            run_id=run.run_id,
            partition_id=run.part.partition_id,
            recipe=run.recipe,
            artifact=run.config.artifact,
            backbone=run.config.backbone,
            template=run.config.data.template,
            threads=shape.threads,
        )
        tune(run.plan, task, shape, run.config.ray, progress.update)
        for reports in read_done(run.store, run.run_id, run.plan.packs).values():
            run.reports |= {report.user_key: report for report in reports}


def _register(run: Run, registry: Registry, progress: RunProgress) -> None:
    total = sum(len(pack.users) for pack in run.plan.packs)
    if total:
        progress.stage("register", total)
    done = 0
    for pack in run.plan.packs:
        reports = [run.reports[user.user_key] for user in pack.users]
        planned = {user.user_key: user for user in pack.users}
        hold_overtaken(registry, run.config.registry.prefix_name, reports, planned)
        record = PackRecord(
            run_id=run.run_id,
            pack_id=pack.pack_id,
            params=_params(run),
            metrics=pack_metrics(reports),
        )

        def lineage(
            report: UserReport, planned: Mapping[str, PlannedUser] = planned
        ) -> dict[str, str]:
            user = planned[report.user_key]
            return {
                "training_digest": user.training_digest,
                "data_digest": user.data_digest,
                "backbone": run.backbone_name,
                "backbone_fingerprint": run.fingerprint,
                "template_digest": run.template_digest,
                "config_digest": run.config_digest,
                "method": run.config.method.type,
                "partition_id": run.part.partition_id,
                "run_id": run.run_id,
                "decision": report.decision or "",
                **{
                    key: str(report.details[key])
                    for key in ("started_from", "continued_from", "start_ignored", "resets")
                    if report.details.get(key)
                },
            }

        register_pack(
            registry,
            run.store,
            record,
            reports,
            lineage,
            run.config.registry.prefix_name,
            _gate_digest(run),
        )
        done += len(reports)
        progress.update(done)


def _params(run: Run) -> dict[str, str]:
    sections = run.config.model_dump(mode="json", include={"method", "train", "gate", "backbone"})
    return {
        f"{section}.{key}": str(value)
        for section, values in sections.items()
        for key, value in values.items()
    }


def _promoted(run: Run) -> dict[str, str]:
    return {
        report.user_key: report.digest
        for report in run.reports.values()
        if report.decision == "promoted" and report.digest
    }


def _finish(run: Run) -> RunFacts:
    """Write users.parquet, report.html and, last, summary.json: the run's commit."""
    facts = RunFacts(
        run_id=run.run_id,
        users=[(row["user_id"], run.reports[row["user_key"]]) for row in run.index],
        users_total=len(run.index),
        rows_read=run.part.rows_read,
        rows_kept=run.part.rows_kept,
        rows_quarantined=run.part.rows_quarantined,
        tokens_trained=sum(report.tokens for report in run.reports.values()),
        seconds=run.seconds,
        split_rows={
            row["user_key"]: {split: row[f"rows_{split}"] for split in ("train", "valid", "test")}
            for row in run.index
        },
        store=run.store.root,
        registry_uri=registry_uri(run.config.registry, run.store),
        report_path=run.store.path(run.name("report.html")),
    )
    run.store.remove(run.name("ray"))  # Ray Train's own state; nothing reads it again
    table = users_table(facts)
    with run.store.open_write(run.name("users.parquet")) as file:
        pq.write_table(table, file)
    run.store.write(run.name("report.html"), html_report(facts).encode("utf-8"))
    run.store.write_json(run.name("summary.json"), summary(facts))
    return facts
