"""The run: partition, plan, tune, register, deploy; resumes an unfinished run.

Workers train, score and gate. Packs are registered as they are committed, while others train.

Progress is read from what has been committed: the partition's record, done-records, the registry.
A run without a summary.json is unfinished, and the next `ptuning run` with the same inputs and
configuration resumes it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines import stages
from pipelines.candidates.stream import RegistrationStream
from pipelines.config import RunConfig, command_options
from pipelines.gangs import cluster
from pipelines.opening import Run, check_inputs, open_run, reach_registry
from pipelines.plan import IndexRow, Plan
from pipelines.report.page import html_report
from pipelines.report.progress import RunProgress
from pipelines.report.summary import RunFacts, make_summary, users_table
from pipelines.rows.manifest import Delivery, record_delivery
from pipelines.rows.partition import make_partition
from ptuning.registry import registry_uri
from ptuning.store import Store
from ptuning.store_identity import open_identity
from ptuning.types import UserReport

_DELIVERIES: dict[Delivery, str] = {
    "append": "the input was added to what was delivered before ({earlier:,} other files); nothing "
    "is gone because it is missing from it (data.delivery=append)",
    "snapshot": "the input was taken as a complete snapshot: rows and users missing from it are "
    "gone (data.delivery=snapshot)",
}


def execute(
    sources: Sequence[str], store: Store, config: RunConfig, progress: RunProgress
) -> RunFacts:
    """Run every stage and write the results; returns the facts for the end report."""
    watch = Stopwatch()
    with watch.time("start"):
        check_inputs(sources, store, config)
        store.sweep()
        identity = open_identity(store, namespace=config.registry.namespace)
        backbone = cluster.identify_backbone(config)
        registry = reach_registry(config, store, identity, backbone.fingerprint)
    with cluster.session(config.ray) as seconds:
        watch.seconds["start"] += seconds
        with watch.time("partition"):
            part = make_partition(
                sources,
                store,
                config.data,
                config.backbone.name,
                identity,
                series=config.registry.prefix_name,
                progress=_rows_of(progress),
            )
        with open_run(store, config, part, identity, backbone) as run:
            with watch.time("plan"):
                rows = stages.read_rows(run)
                plan = stages.plan_run(run, registry, rows)
                record_delivery(  # not before: the plan may refuse what was delivered
                    store,
                    config.registry.prefix_name,
                    part.partition_id,
                    part.delivered,
                    config.data.delivery,
                )
            with watch.time("partition"):
                stages.gather(run, plan, rows, _rows_of(progress))
            registrar = stages.Registrar(run, plan, registry)
            with RegistrationStream(
                registrar.register,
                patience_s=config.registry.patience_s,
                note=progress.note,
            ) as stream:
                with watch.time("tune"), _stage(progress, "tune", _users(plan.packs)):
                    stages.train(run, plan, progress.update, progress.note, stream.add)
                total = _users((*plan.packs, *plan.judged))
                with _stage(progress, "register", total):
                    for pack in registrar.all_packs():
                        stream.add(pack)
                    stream.finish(progress.update)
            watch.seconds |= {
                "evaluate": registrar.evaluate_seconds,
                "register": stream.seconds,
            }
            reports = registrar.reports
            with watch.time("deploy"):
                late = stages.publish(run, plan, registry, reports)
            outcomes = stages.outcomes(plan, reports)
            facts = _facts(run, config, rows, plan, outcomes, late, watch.stop())
            _finish(run, facts)
    return facts


class Stopwatch:
    """Seconds of each stage; `stop` adds the total."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - begin

    def stop(self) -> dict[str, float]:
        return self.seconds | {"total": time.monotonic() - self._began}


@contextlib.contextmanager
def _stage(progress: RunProgress, name: str, users: int) -> Iterator[None]:
    if users:
        progress.stage(name, users)
    yield


def _users(packs: Sequence[Any]) -> int:
    return sum(len(pack.users) for pack in packs)


def _rows_of(progress: RunProgress) -> Any:
    """A callback that shows each step of the partition as a progress stage."""
    shown = ""

    def report(step: str, done: int, total: int) -> None:
        nonlocal shown
        if step != shown:
            unit = "tasks" if total else "rows"
            progress.stage(f"partition: {step}", total or None, unit=unit)
            shown = step
        progress.update(done)

    return report


def _facts(
    run: Run,
    config: RunConfig,
    rows: Sequence[IndexRow],
    plan: Plan,
    outcomes: Mapping[str, UserReport],
    late: Sequence[str],
    seconds: Mapping[str, float],
) -> RunFacts:
    """The facts for the reports. `config` is as requested, not as resolved, because the suggested
    commands repeat the request."""
    gone = outcomes.keys() - {row.user_key for row in rows}
    return RunFacts(
        run_id=run.run_id,
        users=[(row.user_id, outcomes[row.user_key]) for row in rows]
        + [(None, outcomes[key]) for key in sorted(gone)],
        users_total=len(rows) + len(gone),
        rows_read=run.part.rows_read,
        rows_kept=run.part.rows_kept,
        rows_quarantined=run.part.rows_quarantined,
        tokens_trained=sum(report.tokens for report in outcomes.values()),
        seconds=seconds,
        split_rows={row.user_key: row.rows for row in rows},
        notices=_notices(run, plan, late),
        bad_files=run.part.bad_files,
        key_of=run.identity.user_key,
        options=command_options(config),
        store=run.store.root,
        registry_uri=registry_uri(run.config.registry, run.store),
        report_path=run.folder.report_path,
    )


def _notices(run: Run, plan: Plan, late: Sequence[str]) -> tuple[str, ...]:
    """Remarks for the reader that no number shows."""
    kept = f"{plan.kept:,} users keep a prefix of rows that are gone (data.on_shrink=keep)"
    of_rows = [str(notice.text) for notice in run.part.notices]
    behind = f"replicas that do not serve the new list yet: {', '.join(late)}"
    delivery = _DELIVERIES[run.config.data.delivery].format(earlier=run.part.earlier_files)
    shrunk = f"{run.part.shrunk:,} users have fewer rows than in the partition before"
    return (
        delivery,
        *([shrunk] if run.part.shrunk else []),
        *of_rows,
        *plan.notes,
        *([kept] if plan.kept else []),
        *([behind] if late else []),
    )


def _finish(run: Run, facts: RunFacts) -> None:
    """Write the users table, the page and, last, the summary, which commits the run."""
    run.folder.remove_scratch()
    run.folder.write_users(users_table(facts))
    run.folder.write_report(html_report(facts))
    run.folder.write_summary(make_summary(facts))
