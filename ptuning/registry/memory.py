"""An in-memory registry, for tests and dry runs.

It passes the same contract tests as the MLflow registry, and is lost when the process ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ptuning.errors import RegistryError, RegistryUnreachable
from ptuning.registry.base import (
    Current,
    PackRecord,
    Registration,
    Version,
    check_entry,
    check_owner,
    leave_newer_champion,
    moves_candidate,
)
from ptuning.registry.names import Alias, Scope, check_alias, check_names


@dataclass
class _Model:
    """One registered model: its versions, oldest first, their entries, and its aliases (version
    numbers)."""

    versions: list[Version] = field(default_factory=list)
    entries: dict[str, Registration] = field(default_factory=dict)  # by digest
    aliases: dict[Alias, str] = field(default_factory=dict)

    def aliased(self, alias: Alias) -> Version | None:
        number = self.aliases.get(alias)
        return None if number is None else self.versions[int(number) - 1]


@dataclass
class MemoryServer:
    """The state that several registries share, like one MLflow: models by full name, packs by
    (namespace, run_id, pack_id), and the owner of each namespace."""

    models: dict[str, _Model] = field(default_factory=dict)
    packs: dict[tuple[str, str, str], PackRecord] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    unreachable: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)


class MemoryRegistry:
    """A registry in memory, safe to share between threads; by default on a new server.

    `unreachable = True` makes every call raise RegistryUnreachable, like a server that is down.
    """

    def __init__(self, scope: Scope | None = None, server: MemoryServer | None = None) -> None:
        self.scope = scope or Scope("test", "0" * 64, "test")
        self.server = server or MemoryServer()

    @property
    def unreachable(self) -> bool:
        return self.server.unreachable

    @unreachable.setter
    def unreachable(self, value: bool) -> None:
        self.server.unreachable = value

    @property
    def packs(self) -> dict[tuple[str, str], PackRecord]:
        """What MLflow's runs would contain, by (run_id, pack_id)."""
        return {
            (run_id, pack_id): pack
            for (namespace, run_id, pack_id), pack in self.server.packs.items()
            if namespace == self.scope.namespace
        }

    def entry(self, user_key: str, prefix_name: str, digest: str) -> Registration:
        """What a version's tags and description would contain."""
        return self.server.models[self.scope.model_name(user_key, prefix_name)].entries[digest]

    def versions(self, user_key: str, prefix_name: str = "default") -> list[Version]:
        """All versions, oldest first."""
        model = self.server.models.get(self.scope.model_name(user_key, prefix_name), _Model())
        return list(model.versions)

    def register(self, pack: PackRecord, entries: Sequence[Registration]) -> list[Version]:
        """See `Registry.register`."""
        for entry in entries:
            check_entry(entry)
        with self.server.lock:
            self._ask()
            self.server.owners.setdefault(self.scope.namespace, self.scope.store_id)
            key = (self.scope.namespace, pack.run_id, pack.pack_id)
            self.server.packs.setdefault(key, pack)
            return [self._register(pack, entry) for entry in entries]

    def champion(self, user_key: str, prefix_name: str = "default") -> Version | None:
        """See `Registry.champion`."""
        name = self.scope.model_name(user_key, prefix_name)
        with self.server.lock:
            self._ask()
            return self.server.models.get(name, _Model()).aliased("champion")

    def current(self, user_keys: Iterable[str], prefix_name: str = "default") -> dict[str, Current]:
        """See `Registry.current`."""
        names = {key: self.scope.model_name(key, prefix_name) for key in user_keys}
        with self.server.lock:
            self._ask()
            models = {key: self.server.models.get(name, _Model()) for key, name in names.items()}
            return {
                key: Current(
                    candidate=model.aliased("candidate"), champion=model.aliased("champion")
                )
                for key, model in models.items()
                if model.aliases
            }

    def set_alias(self, version: Version, alias: Alias) -> None:
        """See `Registry.set_alias`."""
        check_names(version.user_key, version.prefix_name)
        check_alias(alias)
        name = self.scope.model_name(version.user_key, version.prefix_name)
        with self.server.lock:
            self._ask()
            model = self.server.models.get(name, _Model())
            numbers = [known.version for known in model.versions]
            if version.version not in numbers:
                raise RegistryError(
                    "no such version in the registry", seen=version.version, expected=numbers
                )
            model.aliases[alias] = version.version

    def remove_alias(self, user_key: str, prefix_name: str, alias: Alias) -> None:
        """See `Registry.remove_alias`."""
        check_alias(alias)
        name = self.scope.model_name(user_key, prefix_name)
        with self.server.lock:
            self._ask()
            if model := self.server.models.get(name):
                model.aliases.pop(alias, None)

    def with_champion(self, prefix_name: str = "default") -> Iterator[str]:
        """See `Registry.with_champion`."""
        with self.server.lock:
            self._ask()
            named = [(name, model) for name, model in self.server.models.items() if model.aliases]
        for name, model in named:
            key = self.scope.key_of(name, prefix_name)
            if key is not None and "champion" in model.aliases:
                yield key

    def _register(self, pack: PackRecord, entry: Registration) -> Version:
        name = self.scope.model_name(entry.user_key, entry.prefix_name)
        model = self.server.models.setdefault(name, _Model())
        known = next((v for v in model.versions if v.digest == entry.digest), None)
        if known is not None and known.planned_at > pack.planned_at:
            return known  # a newer run judged it
        entry = leave_newer_champion(entry, pack, model.aliased("champion"))
        number = int(known.version) if known else len(model.versions) + 1
        version = _version(pack, entry, number)
        model.versions[number - 1 : number] = [version]
        model.entries[entry.digest] = entry
        if entry.decision == "promoted":
            model.aliases["champion"] = version.version
        if moves_candidate(entry, pack, model.aliased("candidate")):
            model.aliases["candidate"] = version.version
        return version

    def _ask(self) -> None:
        if self.server.unreachable:
            raise RegistryUnreachable(
                "the model registry cannot be reached", uri="memory://", fix="set unreachable=False"
            )
        owner = self.server.owners.get(self.scope.namespace)
        if owner is not None:
            check_owner(self.scope, owner)


def _version(pack: PackRecord, entry: Registration, number: int) -> Version:
    return Version(
        user_key=entry.user_key,
        prefix_name=entry.prefix_name,
        version=str(number),
        digest=entry.digest,
        training_digest=entry.training_digest,
        data_digest=entry.data_digest,
        gate_digest=entry.gate_digest,
        decision=entry.decision,
        planned_at=pack.planned_at,
        run_id=pack.run_id,
        pack_id=pack.pack_id,
    )
