"""The registry's protocol: what a run writes and the service reads, whatever the backend.

A registry is opened for one `Scope`: one store's namespace and one backbone. A user's prefixes are
versions of one registered model per (user_key, prefix_name), with two aliases: `candidate` (the
newest one that the gate judged) and `champion` (served). A version records which prefix it is,
never where the file is: a reader finds the file in its store by (user_key, digest). So stores can
move, and write access to the registry is not enough to make a reader fetch other files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, runtime_checkable

from pydantic import Field

from ptuning.errors import RegistryError
from ptuning.registry.names import (
    LINEAGE,
    PREFIX_NAME_PATTERN,
    Alias,
    Scope,
    check_digest,
    check_names,
)
from ptuning.store_identity import NAMESPACE_PATTERN
from ptuning.types import Config, Decision


class RegistryConfig(Config):
    SECTION: ClassVar[str] = "registry"

    uri: str | None = Field(
        None,
        description="MLflow tracking and registry URI (http://…, postgresql://…, sqlite:///…); "
        "none: the store's embedded mlflow.db",
    )
    namespace: str | None = Field(
        None,
        pattern=f"^{NAMESPACE_PATTERN}$",
        description="prefix of a new store's registered names; none: a random one. "
        "A store keeps the namespace it was created with, and no other store can use it",
    )
    experiment: str = Field("ptuning", description="MLflow experiment, with one run per pack")
    prefix_name: str = Field(
        "default",
        pattern=f"^{PREFIX_NAME_PATTERN}$",
        description="which of a user's named prefixes this run trains",
    )
    patience_s: float = Field(
        600.0,
        ge=0.0,
        description="how long a run waits for a registry that stops answering, in seconds",
    )


@dataclass(frozen=True, kw_only=True)
class Registration:
    """One prefix to register, and what a run decided about it.

    `gate_digest` identifies the gate that judged it, or is empty if the decision is pending;
    `reason` is a sentence for a reviewer; `tags` are lineage, with keys from `names.LINEAGE`.
    """

    user_key: str
    prefix_name: str
    digest: str
    training_digest: str
    data_digest: str
    decision: Decision
    template_digest: str = ""
    gate_digest: str = ""
    reason: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Version:
    """One registered version. `version` is a string, as in MLflow; `decision`, `planned_at`,
    `run_id` and `pack_id` are those of the run that judged it last, which keeps its losses."""

    user_key: str
    prefix_name: str
    version: str
    digest: str
    training_digest: str
    data_digest: str
    gate_digest: str = ""
    decision: str = ""
    planned_at: int = 0
    run_id: str = ""
    pack_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Current:
    """A user's two aliases; either may be missing."""

    candidate: Version | None = None
    champion: Version | None = None


@dataclass(frozen=True, kw_only=True)
class PackRecord:
    """The contents of a pack's MLflow run: parameters and metrics shown in the UI.

    `planned_at` is when the run made its plan, in epoch milliseconds. A run that planned earlier
    never overrides an alias or a decision of a run that planned later.
    """

    run_id: str
    pack_id: str
    planned_at: int = 0
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Registry(Protocol):
    """Every method raises RegistryError if the namespace belongs to another store."""

    @property
    def scope(self) -> Scope:
        """The namespace and backbone of the names that this registry reads and writes."""

    def register(self, pack: PackRecord, entries: Sequence[Registration]) -> list[Version]:
        """Register each entry as a version, move `champion` to it if promoted, then `candidate`.
        In this order, a process killed in between leaves a user that does not count as finished.

        Idempotent: an entry whose digest is already registered makes no second version, and a pack
        registered twice makes no second MLflow run. A version that is judged again gets its new
        decision, reason, gate, metrics, lineage and run.

        A `pending` entry moves no alias. A resumed older run changes nothing that a newer run
        decided: a version that a newer run judged is returned unchanged, and an entry that would
        replace a newer run's champion is returned with `decision` "pending".
        """

    def champion(self, user_key: str, prefix_name: str = "default") -> Version | None:
        """The version being served, or None. Raises RegistryError if the registry cannot be
        reached, since that must not be mistaken for having no champion."""

    def current(self, user_keys: Iterable[str], prefix_name: str = "default") -> dict[str, Current]:
        """Both aliases of many users at once; users who were never registered are absent."""

    def set_alias(self, version: Version, alias: Alias) -> None:
        """Point an alias of the version's model to this version."""

    def remove_alias(self, user_key: str, prefix_name: str, alias: Alias) -> None:
        """Remove an alias; does nothing if there is none."""

    def with_champion(self, prefix_name: str = "default") -> Iterator[str]:
        """Keys of all users of this backbone who have a champion with that prefix name."""


# Rules shared by all registries.


def check_entry(entry: Registration) -> None:
    """Raise RegistryError for an invalid entry, before anything is written."""
    check_names(entry.user_key, entry.prefix_name)
    check_digest(entry.digest)
    unknown = sorted(set(entry.tags) - LINEAGE)
    if unknown:
        raise RegistryError(
            "a registration has unknown tags",
            seen=", ".join(unknown),
            expected=f"keys of {', '.join(sorted(LINEAGE))}",
            fix="declare the tag in ptuning/registry/names.py",
        )


def check_owner(scope: Scope, owner: str | None) -> None:
    """Raise RegistryError if another store owns the namespace. `owner` is the store id recorded in
    the registry, or None if the record has no id."""
    if owner != scope.store_id:
        raise RegistryError(
            "the registry's namespace belongs to another store",
            seen=f"namespace {scope.namespace} of store {owner or 'unknown'}",
            expected=f"store {scope.store_id}",
            fix="make the store with another registry.namespace, or use another registry.uri",
        )


def leave_newer_champion(
    entry: Registration, pack: PackRecord, champion: Version | None
) -> Registration:
    """The entry, made `pending` if it would replace the champion of a run that planned later."""
    if entry.decision != "promoted" or champion is None or champion.planned_at <= pack.planned_at:
        return entry
    reason = "a newer run promoted another prefix meanwhile; the next run compares with it"
    return replace(entry, decision="pending", reason=reason, gate_digest="")


def moves_candidate(entry: Registration, pack: PackRecord, candidate: Version | None) -> bool:
    """Whether the entry becomes the user's candidate: it was judged, and not by an older run."""
    judged = entry.decision != "pending"
    return judged and (candidate is None or candidate.planned_at <= pack.planned_at)
