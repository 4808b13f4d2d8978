"""Read models, aliases and versions, many names a query."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlflow.entities.model_registry import ModelVersion, RegisteredModel

from ptuning.errors import RegistryError
from ptuning.registry.base import Version
from ptuning.registry.mlflow.connection import Connection
from ptuning.registry.names import (
    DATA_DIGEST,
    DECISION,
    DIGEST,
    DIGEST_PATTERN,
    FINGERPRINT,
    GATE_DIGEST,
    PACK_ID,
    PLANNED_AT,
    RUN_ID,
    TRAINING_DIGEST,
    Scope,
    matches,
)

_PAGE = 1000  # the most that search_registered_models gives at once


@dataclass
class KnownVersion:
    """A version as the registry has it; kept up to date while a pack registers."""

    number: str
    tags: dict[str, str]
    description: str


@dataclass
class KnownModel:
    """What the registry holds of one model; kept up to date while a pack registers."""

    versions: dict[str, KnownVersion] = field(default_factory=dict)  # by number
    aliases: dict[str, str] = field(default_factory=dict)  # alias -> number

    def find(self, digest: str) -> KnownVersion | None:
        """The version of a digest. There may be two, where an HTTP request was retried after
        its answer was lost: the oldest counts, for every reader and writer."""
        found = [known for known in self.versions.values() if known.tags.get(DIGEST) == digest]
        return min(found, key=lambda known: int(known.number), default=None)


def read_models(to: Connection, names: Sequence[str]) -> dict[str, KnownModel]:
    """What is registered under each of `names`; a name without a model is absent."""
    models = find_models(to, names)
    known = {
        model.name: KnownModel(aliases={a: str(v) for a, v in model.aliases.items()})
        for model in models
    }
    with_versions = [model.name for model in models if model.latest_versions]
    for found in _find_versions(to, with_versions):
        number = str(found.version)
        known[found.name].versions[number] = KnownVersion(
            number, dict(found.tags), found.description or ""
        )
    return known


def find_models(to: Connection, names: Sequence[str]) -> list[RegisteredModel]:
    """The registered models of `names` that exist."""
    return _find(to, to.models.search_registered_models, names)


def read_all(to: Connection, prefix: str) -> Iterator[RegisteredModel]:
    """Every registered model whose name begins with `prefix`, a page at a time. `prefix` is of
    a Scope: its letters mean themselves in a filter."""
    token = None
    while True:
        with to.asking("list registered models"):
            page = to.models.search_registered_models(
                f"name LIKE '{prefix}%'", max_results=_PAGE, page_token=token
            )
        yield from page
        token = page.token
        if not token:
            return


def find_aliased(
    to: Connection, models: Sequence[RegisteredModel]
) -> dict[tuple[str, str], ModelVersion]:
    """The versions that aliases of `models` point at, by (model's name, number)."""
    # A model brings its latest version along, and most aliases point there. The rest are
    # asked for by number, so that a user's long history is not read for one champion.
    known = {(v.name, str(v.version)): v for model in models for v in model.latest_versions}
    missing: dict[int, list[str]] = {}
    for model in models:
        for number in {str(number) for number in model.aliases.values()}:
            if (model.name, number) not in known:
                missing.setdefault(int(number), []).append(model.name)
    for wanted, names in missing.items():
        found = _find_versions(to, names, f" AND version_number = {wanted}")
        known.update({(v.name, str(v.version)): v for v in found})
    return known


def _find_versions(to: Connection, names: Sequence[str], also: str = "") -> list[ModelVersion]:
    return _find(to, to.models.search_model_versions, names, also)


def _find(
    to: Connection, search: Callable[..., Any], names: Sequence[str], also: str = ""
) -> list[Any]:
    """All that `search` finds under `names` (from `Scope`), a chunk of names a query."""

    def read_chunk(start: int) -> list[Any]:
        quoted = ",".join(f"'{name}'" for name in names[start : start + to.names_per_query])
        found: list[Any] = []
        token = None
        while True:
            page = search(f"name IN ({quoted}){also}", max_results=_PAGE, page_token=token)
            found.extend(page)
            token = page.token
            if not token:
                return found

    starts = list(range(0, len(names), to.names_per_query))
    return [item for found in to.map(read_chunk, starts) for item in found]


def version_of(
    scope: Scope, user_key: str, prefix_name: str, number: str, tags: dict[str, str]
) -> Version:
    """What a version's tags say. Raises RegistryError where they are not of a version that
    ptuning registered for this backbone: anybody may have written them."""
    if not matches(DIGEST_PATTERN, tags.get(DIGEST, "")):
        raise _not_ours(scope, user_key, prefix_name, number, f"{DIGEST}={tags.get(DIGEST)!r}")
    if tags.get(FINGERPRINT) != scope.fingerprint:
        seen = f"{FINGERPRINT}={tags.get(FINGERPRINT)!r}"
        raise _not_ours(scope, user_key, prefix_name, number, seen)
    planned_at = tags.get(PLANNED_AT, "0")
    return Version(
        user_key=user_key,
        prefix_name=prefix_name,
        version=number,
        digest=tags[DIGEST],
        training_digest=tags.get(TRAINING_DIGEST, ""),
        data_digest=tags.get(DATA_DIGEST, ""),
        gate_digest=tags.get(GATE_DIGEST, ""),
        decision=tags.get(DECISION, ""),
        planned_at=int(planned_at) if matches("[0-9]{1,18}", planned_at) else 0,
        run_id=tags.get(RUN_ID, ""),
        pack_id=tags.get(PACK_ID, ""),
    )


def _not_ours(
    scope: Scope, user_key: str, prefix_name: str, number: str, seen: str
) -> RegistryError:
    return RegistryError(
        "an alias points at a version that ptuning did not register",
        seen=f"{scope.model_name(user_key, prefix_name)}, version {number}, {seen}",
        expected=f"a version with a {DIGEST}, and {FINGERPRINT}={scope.fingerprint}",
        fix="point the alias at a version that a run registered",
    )
