"""Register a run's candidates: one MLflow run per pack, one version per user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.plan import PlannedUser
from pipelines.report.metrics import user_metrics
from ptuning.registry.base import PackRecord, Registration, Registry
from ptuning.types import Decision, Gate, UserReport


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The lineage shared by all prefixes that a run registers; `tags` have keys from
    registry/names.py."""

    prefix_name: str
    template_digest: str
    gate_digest: str
    tags: Mapping[str, str]


_USER_TAGS = ("started_from", "continued_from", "start_ignored", "resets")  # from report.details


def register_pack(
    registry: Registry,
    pack: PackRecord,
    reports: Sequence[UserReport],
    planned: Mapping[str, PlannedUser],
    lineage: Lineage,
) -> None:
    """Register every trained user of a pack, and update decisions that a newer run has overridden
    meanwhile. Idempotent: a repeated call adds nothing."""
    ready = [report for report in reports if report.status == "trained" and report.digest]
    entries = [_registration(report, planned[report.user_key], lineage) for report in ready]
    if not entries:
        return
    for report, version in zip(ready, registry.register(pack, entries), strict=True):
        if report.decision == "promoted" and version.decision == "pending":
            hold(report, "a newer run has decided about this user meanwhile")


def _registration(report: UserReport, user: PlannedUser, lineage: Lineage) -> Registration:
    assert report.digest is not None
    decision: Decision = report.decision or "pending"
    user_tags = {key: str(report.details[key]) for key in _USER_TAGS if report.details.get(key)}
    return Registration(
        user_key=report.user_key,
        prefix_name=lineage.prefix_name,
        digest=report.digest,
        training_digest=user.training_digest,
        data_digest=user.data_digest,
        template_digest=lineage.template_digest,
        decision=decision,
        gate_digest="" if decision == "pending" else lineage.gate_digest,
        reason=report.gate.reason if report.gate else "",
        tags={**lineage.tags, **user_tags},
        metrics=user_metrics(report),
    )


def hold_overtaken(
    registry: Registry,
    prefix_name: str,
    reports: Sequence[UserReport],
    planned: Mapping[str, PlannedUser],
) -> set[str]:
    """Make users `pending` if their aliases have changed since the plan.

    A new champion has never been compared with this run's prefix. A new candidate comes from a
    newer run, so this run's prefix has older rows or settings. It must not be registered at all:
    otherwise a resumed old run would move the alias back, and the user would train again. Returns
    the keys of the users with a new candidate.
    """
    current = registry.current(planned, prefix_name)
    overtaken = set()
    for report in reports:
        if report.status != "trained":
            continue
        now, user = current.get(report.user_key), planned[report.user_key]
        champion = now.champion.digest if now and now.champion else None
        candidate = now.candidate.digest if now and now.candidate else None
        if candidate not in (None, user.candidate_digest, report.digest):
            overtaken.add(report.user_key)
            hold(report, "a newer run has trained this user meanwhile; its prefix is kept")
        elif report.decision == "promoted" and champion not in (
            None,
            user.champion_digest,
            report.digest,
        ):
            reason = "the champion changed during this run; the next run compares with it"
            hold(report, reason)
    return overtaken


def hold(report: UserReport, reason: str) -> None:
    """Make a user's decision pending."""
    report.decision = "pending"
    report.gate = Gate(decision="pending", reason=reason)


def retire_users(
    registry: Registry, user_keys: Sequence[str], prefix_name: str, planned_at: int
) -> list[str]:
    """Remove both aliases, so that the base model serves these users. Returns the users' keys.

    The candidate is removed too: otherwise a user who returns with the same rows would count as
    unchanged. It is removed last, so that an interrupted call is repeated. A user judged by a run
    that planned later than `planned_at` has rows again and is left alone.
    """
    retired = []
    for key, now in registry.current(user_keys, prefix_name).items():
        versions = [version for version in (now.candidate, now.champion) if version is not None]
        if any(version.planned_at > planned_at for version in versions):
            continue
        if now.champion is not None:
            registry.remove_alias(key, prefix_name, "champion")
        if now.candidate is not None:
            registry.remove_alias(key, prefix_name, "candidate")
        retired.append(key)
    return retired
