"""Put a run's candidates into the registry: one MLflow run per pack, one version per user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from pipelines.plan import PlannedUser
from pipelines.report.metrics import WHO, check_names
from ptuning.registry.base import PackRecord, Registration, Registry
from ptuning.types import Decision, Gate, UserReport


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """What is the same for every prefix that a run registers; `tags` are of registry/names.py."""

    prefix_name: str
    template_digest: str
    gate_digest: str
    tags: Mapping[str, str]


_OF_USER = ("started_from", "continued_from", "start_ignored", "resets")  # in a report's details


def register_pack(
    registry: Registry,
    pack: PackRecord,
    reports: Sequence[UserReport],
    planned: Mapping[str, PlannedUser],
    lineage: Lineage,
) -> None:
    """Register every trained user of a pack, and set what the registry made of each decision: a
    newer run may have decided otherwise meanwhile. Idempotent: a repeated call adds nothing."""
    ready = [report for report in reports if report.status == "trained" and report.digest]
    entries = [_registration(report, planned[report.user_key], lineage) for report in ready]
    if not entries:
        return
    for report, version in zip(ready, registry.register(pack, entries), strict=True):
        if report.decision == "promoted" and version.decision == "pending":
            _hold(report, "a newer run decided about this user meanwhile")


def _registration(report: UserReport, user: PlannedUser, lineage: Lineage) -> Registration:
    assert report.digest is not None
    decision: Decision = report.decision or "pending"
    of_user = {key: str(report.details[key]) for key in _OF_USER if report.details.get(key)}
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
        tags={**lineage.tags, **of_user},
        metrics=user_metrics(report),
    )


def hold_overtaken(
    registry: Registry,
    prefix_name: str,
    reports: Sequence[UserReport],
    planned: Mapping[str, PlannedUser],
) -> set[str]:
    """Leave users `pending` whose aliases changed since the plan.

    A champion that is new was never compared with. A candidate that is new is a newer run's: then
    this run's prefix is of older rows or settings, and is not to be registered at all, or an old
    run that is resumed would move the alias back and everybody would train again. Returns the
    keys of those.
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
            _hold(report, "a newer run trained this user meanwhile; its prefix stays")
        elif report.decision == "promoted" and champion not in (
            None,
            user.champion_digest,
            report.digest,
        ):
            reason = "the champion changed while this run worked; the next run compares with it"
            _hold(report, reason)
    return overtaken


def _hold(report: UserReport, reason: str) -> None:
    report.decision = "pending"
    report.gate = Gate(decision="pending", reason=reason)


def retire_users(
    registry: Registry, user_keys: Sequence[str], prefix_name: str, planned_at: int
) -> list[str]:
    """Take both aliases away: the base model answers these users from here on. Returns whose.

    The candidate's too, or a user who comes back with the same rows would be taken for one whose
    prefix is up to date. It goes last: whoever is killed in between retires the user again. A user
    whom a run that planned later than `planned_at` judged has rows again, and stays.
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


def user_metrics(report: UserReport) -> dict[str, float]:
    """Figures a reviewer reads beside a version: nats per completion token, steps, tokens."""
    figures: dict[str, float] = {"steps": report.steps, "tokens": report.tokens}
    for who, splits in report.losses.items():
        for split, losses in splits.items():
            if (nll := losses.nll) is not None and nll == nll:
                figures[f"nll_{who}_{split}"] = nll
    for split in ("valid", "test"):  # the gate decides on valid; test is what to publish
        base, own = (figures.get(f"nll_{who}_{split}") for who in ("base", "candidate"))
        if base is not None and own is not None:
            figures[f"gain_over_base_{split}"] = base - own
    return check_names(figures)


def pack_metrics(reports: Sequence[UserReport]) -> dict[str, float]:
    """A pack's medians, for the MLflow run."""
    trained = [report for report in reports if report.status == "trained"]
    figures: dict[str, float] = {
        "users_trained": len(trained),
        "users_promoted": sum(report.decision == "promoted" for report in reports),
        "users_failed": sum(report.status == "failed" for report in reports),
    }
    for who in WHO:
        losses = [user_metrics(report).get(f"nll_{who}_valid") for report in trained]
        known = [loss for loss in losses if loss is not None]
        if known:
            figures[f"nll_{who}_valid_median"] = median(known)
    return check_names(figures)
