"""The registry's protocol on MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from ptuning.registry.base import Current, PackRecord, Registration, Version, check_entry
from ptuning.registry.mlflow.connection import connect
from ptuning.registry.mlflow.databases import make_durable
from ptuning.registry.mlflow.owner import check_namespace
from ptuning.registry.mlflow.packs import close_run, open_run
from ptuning.registry.mlflow.reading import (
    KnownModel,
    find_aliased,
    find_models,
    read_all,
    read_models,
    version_of,
)
from ptuning.registry.mlflow.writing import create_model, register_version
from ptuning.registry.names import Alias, Scope, check_alias


class MlflowRegistry:
    """A registry on an MLflow database (`sqlite:///`, `postgresql://`) or server (`http(s)://`).

    The first process to open a new database creates its schema here. Raises RegistryError if it
    cannot be opened. A server is not contacted before the first call.
    """

    def __init__(self, uri: str, experiment: str, scope: Scope) -> None:
        self.experiment, self.scope = experiment, scope
        self.connection = connect(uri)
        self._owned = False

    def register(self, pack: PackRecord, entries: Sequence[Registration]) -> list[Version]:
        """See `Registry.register`. Versions are returned in the order of `entries`.

        Every entry is checked before the first write. After a RegistryError part of the pack may be
        registered; register it again.
        """
        groups = self._group(entries)
        to = self.connection
        with to.asking(f"register pack {pack.pack_id!r}"):
            self._check_namespace(claim=True)
            run = open_run(to, self.scope, self.experiment, pack)
            known = read_models(to, list(groups))
            done: dict[int, Version] = {}
            for versions in to.map(
                lambda name: self._register_model(name, pack, groups[name], known.get(name), run),
                list(groups),
            ):
                done.update(versions)
            close_run(to, run)
            make_durable(to.sqlite)
        return [done[index] for index in range(len(entries))]

    def champion(self, user_key: str, prefix_name: str = "default") -> Version | None:
        """See `Registry.champion`. Takes 1 to 3 ms on a database, and up to about 35 s if a server
        is down."""
        name = self.scope.model_name(user_key, prefix_name)
        with self.connection.asking("look up a champion"):
            self._check_namespace(claim=False)
            try:
                found = self.connection.models.get_model_version_by_alias(name, "champion")
            except MlflowException as error:
                if not self._is_absent(error, name, "champion"):
                    raise
                return None
        return version_of(self.scope, user_key, prefix_name, str(found.version), found.tags)

    def current(self, user_keys: Iterable[str], prefix_name: str = "default") -> dict[str, Current]:
        """See `Registry.current`. Takes about 0.6 ms per user on SQLite, whatever the registry's
        size."""
        keys = {self.scope.model_name(key, prefix_name): key for key in user_keys}
        with self.connection.asking("look up current prefixes"):
            self._check_namespace(claim=False)
            models = [model for model in find_models(self.connection, list(keys)) if model.aliases]
            versions = find_aliased(self.connection, models)
        found = {}
        for model in models:
            key = keys[model.name]
            aliases: dict[str, Version] = {}
            for alias, number in model.aliases.items():
                if alias not in ("candidate", "champion"):
                    continue  # an alias that a person added
                version = versions.get((model.name, str(number)))
                tags = version.tags if version is not None else {}
                aliases[alias] = version_of(self.scope, key, prefix_name, str(number), tags)
            if aliases:
                found[key] = Current(**aliases)
        return found

    def set_alias(self, version: Version, alias: Alias) -> None:
        """See `Registry.set_alias`. Raises RegistryError if the version does not exist."""
        check_alias(alias)
        name = self.scope.model_name(version.user_key, version.prefix_name)
        to = self.connection
        with to.asking(f"set the alias {alias}"):
            self._check_namespace(claim=True)
            to.write(to.models.set_registered_model_alias, name, alias, version.version)
            make_durable(to.sqlite)

    def remove_alias(self, user_key: str, prefix_name: str, alias: Alias) -> None:
        """See `Registry.remove_alias`."""
        check_alias(alias)
        name = self.scope.model_name(user_key, prefix_name)
        to = self.connection
        with to.asking(f"remove the alias {alias}"):
            self._check_namespace(claim=True)
            try:
                to.models.delete_registered_model_alias(name, alias)
            except MlflowException as error:
                if not self._is_absent(error, name, alias):
                    raise
            make_durable(to.sqlite)

    def with_champion(self, prefix_name: str = "default") -> Iterator[str]:
        """See `Registry.with_champion`. Reads one page of models at a time."""
        with self.connection.asking("list the champions"):
            self._check_namespace(claim=False)
        for model in read_all(self.connection, self.scope.prefix):
            key = self.scope.key_of(model.name, prefix_name)
            if key is not None and "champion" in model.aliases:
                yield key

    def _group(self, entries: Sequence[Registration]) -> dict[str, dict[int, Registration]]:
        """Check all entries and group them by model, each with its index."""
        groups: dict[str, dict[int, Registration]] = {}
        for index, entry in enumerate(entries):
            check_entry(entry)
            name = self.scope.model_name(entry.user_key, entry.prefix_name)
            groups.setdefault(name, {})[index] = entry
        return groups

    def _register_model(
        self,
        name: str,
        pack: PackRecord,
        entries: Mapping[int, Registration],
        known: KnownModel | None,
        run: Run,
    ) -> dict[int, Version]:
        if known is None:
            known = KnownModel()
            create_model(self.connection, name)
        return {
            index: register_version(self.connection, self.scope, pack, entry, known, run)
            for index, entry in entries.items()
        }

    def _check_namespace(self, *, claim: bool) -> None:
        """Check the namespace's owner, until it is known to be this store; owners never change."""
        if not self._owned:
            self._owned = check_namespace(self.connection, self.scope, claim=claim)

    def _is_absent(self, error: MlflowException, name: str, alias: Alias) -> bool:
        """Whether MLflow itself (not a proxy) says that there is no such model or alias."""
        to = self.connection
        if not to.is_answer(error, "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return False
        try:
            model = to.models.get_registered_model(name)
        except MlflowException as second:
            return to.is_answer(second, "RESOURCE_DOES_NOT_EXIST")
        return alias not in model.aliases
