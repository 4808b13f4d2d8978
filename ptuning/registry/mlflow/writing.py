"""Write versions: their identity, the last decision about them, and the aliases.

Everything is read before it is written, so an interrupted call can be repeated safely. There is one
exception: an HTTP request that is retried after its answer was lost may create a second version
with the same digest. That is harmless, since the oldest is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from ptuning.registry.base import (
    PackRecord,
    Registration,
    Version,
    leave_newer_champion,
    moves_candidate,
)
from ptuning.registry.mlflow.connection import Connection
from ptuning.registry.mlflow.reading import KnownModel, KnownVersion, version_of
from ptuning.registry.names import (
    DATA_DIGEST,
    DECISION,
    DIGEST,
    FIGURE,
    FINGERPRINT,
    GATE_DIGEST,
    LINEAGE,
    PACK_ID,
    PLANNED_AT,
    PREFIX_NAME,
    REASON,
    RUN_ID,
    TEMPLATE_DIGEST,
    TRAINING_DIGEST,
    USER_KEY,
    Alias,
    Scope,
    source_of,
)

_MAX_DESCRIPTION = 5000  # characters; a column of MLflow's schema


def create_model(to: Connection, name: str) -> None:
    """Create a user's registered model, if it does not exist."""
    try:
        to.models.create_registered_model(
            name, description="One user's prefixes, a version each. `champion` is served."
        )
    except MlflowException as error:
        # Created by another process, or by this request before a retry.
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def register_version(
    to: Connection, scope: Scope, pack: PackRecord, entry: Registration, model: KnownModel, run: Run
) -> Version:
    """Register one entry of a pack (see `Registry.register`), and keep `model` up to date."""
    known = model.find(entry.digest)
    if known is not None and (version := _read(scope, entry, known)).planned_at > pack.planned_at:
        return version  # a newer run judged it
    entry = leave_newer_champion(entry, pack, _aliased(scope, entry, model, "champion"))
    is_new = known is None
    if known is None:
        known = _create(to, scope, pack, entry, run)
        model.versions[known.number] = known
    # A user counts as finished when `candidate` points to a version with this gate's digest, so
    # the new decision and that alias come last.
    if entry.decision == "promoted":
        _point(to, scope, entry, model, "champion", known)
    if not is_new:
        _update_decision(to, scope, pack, entry, known)
    if moves_candidate(entry, pack, _aliased(scope, entry, model, "candidate")):
        _point(to, scope, entry, model, "candidate", known)
    return _read(scope, entry, known)


def _create(
    to: Connection, scope: Scope, pack: PackRecord, entry: Registration, run: Run
) -> KnownVersion:
    tags = {**_identity(scope, entry), **_decision(pack, entry)}
    description = _description(entry)
    created = to.models.create_model_version(
        scope.model_name(entry.user_key, entry.prefix_name),
        source_of(entry.user_key, entry.digest),
        run.info.run_id,
        tags=tags,
        description=description,
        await_creation_for=0,
    )
    return KnownVersion(str(created.version), tags, description)


def _update_decision(
    to: Connection, scope: Scope, pack: PackRecord, entry: Registration, known: KnownVersion
) -> None:
    """Update the tags and description of a version that is judged again, the gate's digest last: if
    the call is interrupted, the next run judges the user again."""
    name = scope.model_name(entry.user_key, entry.prefix_name)
    tags, description = _decision(pack, entry), _description(entry)
    if known.description != description:
        to.models.update_model_version(name, known.number, description)
        known.description = description
    for tag in [tag for tag in known.tags if _is_optional(tag) and tag not in tags]:
        to.models.delete_model_version_tag(name, known.number, tag)
        del known.tags[tag]
    for tag, value in sorted(tags.items(), key=lambda item: item[0] == GATE_DIGEST):
        if known.tags.get(tag) != value:
            to.write(to.models.set_model_version_tag, name, known.number, tag, value)
            known.tags[tag] = value


def _point(
    to: Connection,
    scope: Scope,
    entry: Registration,
    model: KnownModel,
    alias: Alias,
    known: KnownVersion,
) -> None:
    if model.aliases.get(alias) != known.number:
        name = scope.model_name(entry.user_key, entry.prefix_name)
        to.write(to.models.set_registered_model_alias, name, alias, known.number)
        model.aliases[alias] = known.number


def _aliased(scope: Scope, entry: Registration, model: KnownModel, alias: Alias) -> Version | None:
    known = model.versions.get(model.aliases.get(alias, ""))
    return None if known is None or DIGEST not in known.tags else _read(scope, entry, known)


def _read(scope: Scope, entry: Registration, known: KnownVersion) -> Version:
    return version_of(scope, entry.user_key, entry.prefix_name, known.number, known.tags)


# A version's tags and description.


def _identity(scope: Scope, entry: Registration) -> dict[str, str]:
    """Tags that identify the prefix; they never change."""
    return {
        DIGEST: entry.digest,
        FINGERPRINT: scope.fingerprint,
        TEMPLATE_DIGEST: entry.template_digest,
        TRAINING_DIGEST: entry.training_digest,
        DATA_DIGEST: entry.data_digest,
        USER_KEY: entry.user_key,
        PREFIX_NAME: entry.prefix_name,
    }


def _decision(pack: PackRecord, entry: Registration) -> dict[str, str]:
    """Tags with the decision of the run that judged the version last, its metrics and lineage."""
    return {
        **{tag: str(value) for tag, value in entry.tags.items()},
        **{FIGURE + name: _figure(value) for name, value in entry.metrics.items()},
        DECISION: entry.decision,
        REASON: entry.reason,
        GATE_DIGEST: entry.gate_digest,
        RUN_ID: pack.run_id,
        PACK_ID: pack.pack_id,
        PLANNED_AT: str(pack.planned_at),
    }


def _is_optional(tag: str) -> bool:
    """Whether a tag is removed when a new decision lacks it; tags that people added are kept."""
    return tag in LINEAGE or tag.startswith(FIGURE)


def _description(entry: Registration) -> str:
    """The version page's markdown: the decision and its reason, then the metrics as a table."""
    verdict = f"{entry.decision}: {entry.reason}" if entry.reason else entry.decision
    return "\n\n".join([verdict, *_table(entry.metrics)])[:_MAX_DESCRIPTION]


def _table(metrics: Mapping[str, float]) -> list[str]:
    rows = [f"| {name} | {_figure(value)} |" for name, value in metrics.items()]
    return ["\n".join(["| figure | value |", "|---|---|", *rows])] if rows else []


def _figure(value: float) -> str:
    """Six digits of a loss, all digits of a count."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if value == round(value) else f"{value:.6g}"
