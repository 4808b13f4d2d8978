"""The registry's protocol: what the run writes and the service reads, whatever stands behind it.

A registry is opened for one `Scope`: one store's namespace and one backbone. A user's prefixes
are versions of one registered model per (user_key, prefix_name), with two aliases: `candidate`
(the newest that was judged) and `champion` (served). A version says which prefix it is, never
where its file lies: a reader finds the file in its own store by (user_key, digest), so that
stores can move, and whoever can write the registry cannot make a reader fetch anything.
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
        description="what a new store's registered names begin with; none: a random one. "
        "A store keeps the namespace it was made with, and no other store can use it",
    )
    experiment: str = Field("ptuning", description="MLflow experiment that holds one run per pack")
    prefix_name: str = Field(
        "default",
        pattern=f"^{PREFIX_NAME_PATTERN}$",
        description="which of a user's named prefixes this run trains",
    )


@dataclass(frozen=True, kw_only=True)
class Registration:
    """One prefix to register, and what a run decided about it.

    `gate_digest` says which gate judged it, empty where none did to the end; `reason` is a
    sentence for a reviewer; `tags` are lineage, with keys of `names.LINEAGE`.
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
    """One registered version. `version` is a string, as MLflow gives it; `decision`,
    `planned_at`, `run_id` and `pack_id` are of the run that judged it last; its losses are kept
    there."""

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
    """A user's two aliases now; either may be missing."""

    candidate: Version | None = None
    champion: Version | None = None


@dataclass(frozen=True, kw_only=True)
class PackRecord:
    """What one MLflow run of a pack holds: parameters and metrics shown in the UI.

    `planned_at` is when the run made its plan, in epoch milliseconds: of two runs, the one that
    planned later knows more, and no alias or judgement of its goes back to the earlier one's.
    """

    run_id: str
    pack_id: str
    planned_at: int = 0
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Registry(Protocol):
    """Every method raises RegistryError where the namespace is another store's."""

    @property
    def scope(self) -> Scope:
        """Whose names this registry reads and writes."""

    def register(self, pack: PackRecord, entries: Sequence[Registration]) -> list[Version]:
        """Register each entry as a version, move `champion` to it if promoted, then `candidate`:
        whoever is killed between the two leaves a user that is not taken for finished.

        Idempotent: an entry whose digest is already a version of its model makes no second
        version, and a pack registered twice makes no second MLflow run. A version that is judged
        again tells its new story: decision, reason, gate, figures, lineage and run together.

        A `pending` entry moves no alias. An older run that is resumed changes nothing that a
        newer one decided: a version that a newer run judged comes back as it is, and what would
        replace a newer run's champion comes back with `decision` "pending".
        """

    def champion(self, user_key: str, prefix_name: str = "default") -> Version | None:
        """The serving version, or None. Raises RegistryError if the registry can't be asked:
        'unreachable' must never read as 'has none'."""

    def current(self, user_keys: Iterable[str], prefix_name: str = "default") -> dict[str, Current]:
        """Both aliases of many users at once; users never registered are absent."""

    def set_alias(self, version: Version, alias: Alias) -> None:
        """Point one alias of the version's own model at it."""

    def remove_alias(self, user_key: str, prefix_name: str, alias: Alias) -> None:
        """Take an alias away; nothing happens where there is none."""

    def with_champion(self, prefix_name: str = "default") -> Iterator[str]:
        """Keys of all users of this backbone who have a champion under that name."""


# Rules that every registry follows.


def check_entry(entry: Registration) -> None:
    """Refuse an entry that must not be written, before anything is. Raises RegistryError."""
    check_names(entry.user_key, entry.prefix_name)
    check_digest(entry.digest)
    unknown = sorted(set(entry.tags) - LINEAGE)
    if unknown:
        raise RegistryError(
            "a registration has tags that no reader knows",
            seen=", ".join(unknown),
            expected=f"keys of {', '.join(sorted(LINEAGE))}",
            fix="declare the tag in ptuning/registry/names.py",
        )


def check_owner(scope: Scope, owner: str | None) -> None:
    """Refuse a namespace that another store owns. `owner` is the store id that the registry
    remembers, None where it remembers something else under that name."""
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
    """The entry, `pending` where it would replace what a run that planned later promoted."""
    if entry.decision != "promoted" or champion is None or champion.planned_at <= pack.planned_at:
        return entry
    reason = "a newer run promoted another prefix meanwhile; the next run compares with it"
    return replace(entry, decision="pending", reason=reason, gate_digest="")


def moves_candidate(entry: Registration, pack: PackRecord, candidate: Version | None) -> bool:
    """Whether the entry becomes the user's candidate: judged, and by no older run."""
    judged = entry.decision != "pending"
    return judged and (candidate is None or candidate.planned_at <= pack.planned_at)
