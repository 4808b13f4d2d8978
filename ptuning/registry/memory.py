"""The shipped fake: the registry's contract in dictionaries, for tests and dry runs.

It runs the same contract tests as MLflow. It keeps nothing beyond its process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ptuning.errors import RegistryError
from ptuning.registry.base import (
    Alias,
    Current,
    PackRecord,
    Registration,
    Version,
    check_alias,
    check_names,
)


@dataclass
class _Model:
    """One user's registered model: its versions, oldest first, and its aliases."""

    versions: list[Version] = field(default_factory=list)
    aliases: dict[Alias, Version] = field(default_factory=dict)


class MemoryRegistry:
    """A registry in memory, safe to share between threads.

    `unreachable = True` makes every call raise RegistryError, as a server that is down does.
    `packs` holds what stands in MLflow's runs, by (run_id, pack_id); `entries` what stands in
    a version's tags and description, by (user_key, prefix_name, digest).
    """

    def __init__(self) -> None:
        self.unreachable = False
        self.packs: dict[tuple[str, str], PackRecord] = {}
        self.entries: dict[tuple[str, str, str], Registration] = {}
        self._models: dict[tuple[str, str], _Model] = {}
        self._lock = threading.RLock()

    def register(self, pack: PackRecord, entries: Sequence[Registration]) -> list[Version]:
        """See `Registry.register`."""
        for entry in entries:
            check_names(entry.user_key, entry.prefix_name)
        with self._lock:
            self._ask()
            self.packs.setdefault((pack.run_id, pack.pack_id), pack)
            return [self._register(entry) for entry in entries]

    def champion(self, user_key: str, prefix_name: str = "default") -> Version | None:
        """See `Registry.champion`."""
        check_names(user_key, prefix_name)
        with self._lock:
            self._ask()
            model = self._models.get((user_key, prefix_name))
            return model.aliases.get("champion") if model else None

    def current(self, user_keys: Iterable[str], prefix_name: str = "default") -> dict[str, Current]:
        """See `Registry.current`."""
        keys = list(user_keys)
        for key in keys:
            check_names(key, prefix_name)
        with self._lock:
            self._ask()
            return {
                key: Current(**self._models[key, prefix_name].aliases)
                for key in keys
                if (key, prefix_name) in self._models
            }

    def set_alias(self, version: Version, alias: Alias) -> None:
        """See `Registry.set_alias`."""
        check_names(version.user_key, version.prefix_name)
        check_alias(alias)
        with self._lock:
            self._ask()
            model = self._models.get((version.user_key, version.prefix_name), _Model())
            held = {known.version: known for known in model.versions}
            if version.version not in held:
                raise RegistryError(
                    "no such version in the registry", seen=version.version, expected=sorted(held)
                )
            model.aliases[alias] = held[version.version]

    def remove_alias(self, user_key: str, prefix_name: str, alias: Alias) -> None:
        """See `Registry.remove_alias`."""
        check_names(user_key, prefix_name)
        check_alias(alias)
        with self._lock:
            self._ask()
            if model := self._models.get((user_key, prefix_name)):
                model.aliases.pop(alias, None)

    def with_champion(self, prefix_name: str = "default") -> Iterator[str]:
        """See `Registry.with_champion`."""
        with self._lock:
            self._ask()
            yield from [
                key
                for (key, name), model in self._models.items()
                if name == prefix_name and "champion" in model.aliases
            ]

    def _register(self, entry: Registration) -> Version:
        model = self._models.setdefault((entry.user_key, entry.prefix_name), _Model())
        version = next((v for v in model.versions if v.digest == entry.digest), None)
        if version is None:
            version = _version(entry, len(model.versions) + 1)
            model.versions.append(version)
        elif version.gate_digest != entry.gate_digest:  # judged anew
            judged = replace(
                version,
                gate_digest=entry.gate_digest,
                run_id=entry.tags.get("run_id", ""),
                pack_id=entry.tags.get("pack_id", ""),
            )
            model.versions[model.versions.index(version)] = judged
            version = judged
        self.entries[entry.user_key, entry.prefix_name, entry.digest] = entry
        if entry.promote:
            model.aliases["champion"] = version
        model.aliases["candidate"] = version
        return version

    def _ask(self) -> None:
        if self.unreachable:
            raise RegistryError(
                "the model registry cannot be reached", uri="memory://", fix="set unreachable=False"
            )


def _version(entry: Registration, number: int) -> Version:
    return Version(
        user_key=entry.user_key,
        prefix_name=entry.prefix_name,
        version=str(number),
        digest=entry.digest,
        uri=entry.uri,
        training_digest=entry.training_digest,
        data_digest=entry.data_digest,
        gate_digest=entry.gate_digest,
        run_id=entry.tags.get("run_id", ""),
        pack_id=entry.tags.get("pack_id", ""),
    )
