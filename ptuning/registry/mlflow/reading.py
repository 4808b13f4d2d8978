"""Read models, aliases and versions, many names per query."""

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

_PAGE = 1000  # the maximum of search_registered_models


@dataclass
class KnownVersion:
    """A version as stored in the registry; kept up to date while a pack is registered."""

    number: str
    tags: dict[str, str]
    description: str


@dataclass
class KnownModel:
    """A model as stored in the registry; kept up to date while a pack is registered."""

    versions: dict[str, KnownVersion] = field(default_factory=dict)  # by number
    aliases: dict[str, str] = field(default_factory=dict)  # alias -> number

    def find(self, digest: str) -> KnownVersion | None:
        """The version with a digest. There may be two, if an HTTP request was retried after its
        answer was lost; all readers and writers use the oldest."""
        found = [known for known in self.versions.values() if known.tags.get(DIGEST) == digest]
        return min(found, key=lambda known: int(known.number), default=None)


def read_models(to: Connection, names: Sequence[str]) -> dict[str, KnownModel]:
    """The models with these names; a name without a model is absent."""
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
    """The registered models with these names, as far as they exist."""
    return _find(to, to.models.search_registered_models, names)


def read_all(to: Connection, prefix: str) -> Iterator[RegisteredModel]:
    """Every registered model whose name begins with `prefix`, one page at a time. `prefix` comes
    from a Scope, so it has no special characters of a filter."""
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
    """The versions that aliases of `models` point to, by (model's name, number)."""
    # A model comes with its latest version, and most aliases point to it. The others are queried by
    # number, so that a user's full history is not read for one champion.
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
    """All results of `search` for `names` (from `Scope`), with a chunk of names per query."""

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
    """Parse a version's tags. Raises RegistryError if they are not those of a version that ptuning
    registered for this backbone: anyone can write tags."""
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
        "an alias points to a version that ptuning did not register",
        seen=f"{scope.model_name(user_key, prefix_name)}, version {number}, {seen}",
        expected=f"a version with a {DIGEST}, and {FINGERPRINT}={scope.fingerprint}",
        fix="point the alias at a version that a run registered",
    )
