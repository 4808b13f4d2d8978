"""The registry on MLflow: the only module that imports it.

What stands where: one registered model per (user, prefix name), one version per digest, one
run per pack. A run per user would be the usual MLflow picture, but costs three times as much
to write (40 against 118 users/s) and nobody reads a million runs; so a user's figures are
tags and a description of the version, which is what the UI's version page shows, and the run
holds the pack's.

Speed on SQLite, with two aliases and a dozen tags a user, on two busy cores: 43 users/s
through `MlflowClient`, whose `set_registered_model_alias` first reads the whole model to see
that it is no prompt; 58 through `ModelRegistryClient`; 78 with the embedded database in WAL
mode; 103 with one fsync per `register` instead of one per commit. WAL needs all processes on
one host: several hosts need a server.

Everything is read before it is written, so a call cut short anywhere is repeated safely. What
MLflow cannot promise: an HTTP request that is retried after its answer was lost may leave a
second version of the same digest. It is harmless, the oldest is taken.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from ptuning.errors import ConfigError, RegistryError
from ptuning.registry.base import (
    Alias,
    Current,
    PackRecord,
    Registration,
    Version,
    check_alias,
    check_names,
)
from ptuning.system import environment

environment.set_defaults()  # MLflow reads its variables when it is imported

import requests  # noqa: E402
import sqlalchemy  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Metric, Param, Run  # noqa: E402
from mlflow.entities.model_registry import ModelVersion, RegisteredModel  # noqa: E402
from mlflow.exceptions import MlflowException, RestException  # noqa: E402
from mlflow.store.db.utils import _initialize_tables  # noqa: E402
from mlflow.tracking._model_registry.client import ModelRegistryClient  # noqa: E402

_T = TypeVar("_T")
_R = TypeVar("_R")

PACK_TAG = "ptuning.pack_key"
_MAX_DESCRIPTION = 5000  # characters; columns of MLflow's schema
_MAX_SOURCE = 500
_PAGE = 1000  # the most that search_registered_models gives at once
_NAMES_PER_QUERY = 200
_NAMES_PER_URL = 50  # 3.5 kB of query string; proxies cut at 4 to 8
_ADVISORY_LOCK = 0x7074756E  # "ptun"


def model_name(user_key: str, prefix_name: str) -> str:
    """The registered model's name: `ptuning-<user_key>`, and `-<prefix_name>` if not default.

    A user key has a fixed length, so two (user, prefix name) never share a name. Raises
    RegistryError for names that are not of their pattern: the result is safe in a filter.
    """
    check_names(user_key, prefix_name)
    suffix = "" if prefix_name == "default" else f"-{prefix_name}"
    return f"ptuning-{user_key}{suffix}"


@dataclass
class _Known:
    """What the registry holds of one model; kept up to date while a pack registers."""

    versions: dict[str, ModelVersion] = field(default_factory=dict)  # by digest, the oldest
    aliases: dict[str, str] = field(default_factory=dict)  # alias -> version


class MlflowRegistry:
    """A registry on an MLflow database (`sqlite:///`, `postgresql://`) or server (`http(s)://`).

    A fresh database gets its schema here, once, whoever comes first; RegistryError if it
    cannot be opened. A server is asked when it is first needed. It pickles as its arguments.
    """

    def __init__(self, uri: str, experiment: str = "ptuning") -> None:
        self.experiment = experiment
        self._sqlite = _sqlite_path(uri)
        self.uri = _with_driver(uri) if self._sqlite is None else f"sqlite:///{self._sqlite}"
        self.shown_uri = _without_password(self.uri)
        self._remote = uri.startswith(("http://", "https://"))
        # SQLite has one writer; elsewhere most of a call is waiting for the answer.
        self._workers = 1 if self._sqlite else 4
        self._names_per_query = _NAMES_PER_URL if self._remote else _NAMES_PER_QUERY
        with self._asking("open the registry"), _schema_lock(self.uri, self._sqlite):
            if self._sqlite:
                _create_sqlite(self._sqlite)
            self._runs = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            self._models = ModelRegistryClient(self.uri, self.uri)
            if self._sqlite:
                _sync_once_per_pack(self._models)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.uri, self.experiment))

    def register(self, pack: PackRecord, entries: Sequence[Registration]) -> list[Version]:
        """See `Registry.register`. Versions come back in the order of `entries`.

        Every entry is checked before the first write. RegistryError may leave part of the
        pack registered: register it again.
        """
        groups = _by_model(entries)
        with self._asking(f"register pack {pack.pack_id!r}"):
            run = self._open_run(pack)
            known = self._known(list(groups))
            done: dict[int, Version] = {}
            for versions in self._each(
                lambda name: self._register_model(name, groups[name], known.get(name), run),
                list(groups),
            ):
                done.update(versions)
            self._close_run(run)
            self._make_durable()
        return [done[index] for index in range(len(entries))]

    def champion(self, user_key: str, prefix_name: str = "default") -> Version | None:
        """See `Registry.champion`. 1 to 3 ms on a database; at most about 35 s on a dead server."""
        name = model_name(user_key, prefix_name)
        with self._asking("look up a champion"):
            try:
                found = self._models.get_model_version_by_alias(name, "champion")
            except MlflowException as error:
                if not self._is_absent(error, name, "champion"):
                    raise
                return None
        return self._version(found, user_key, prefix_name)

    def current(self, user_keys: Iterable[str], prefix_name: str = "default") -> dict[str, Current]:
        """See `Registry.current`. About 0.6 ms a user on SQLite, whatever the registry's size."""
        keys = {model_name(key, prefix_name): key for key in user_keys}
        with self._asking("look up current prefixes"):
            models = [model for model in self._find_models(list(keys)) if model.aliases]
            held = self._aliased(models)
        found = {}
        for model in models:
            key = keys[model.name]
            aliases: dict[str, Version] = {}
            for alias, number in model.aliases.items():
                if alias not in ("candidate", "champion"):
                    continue  # somebody's own
                aliases[alias] = self._version(
                    held.get((model.name, str(number))), key, prefix_name
                )
            if aliases:
                found[key] = Current(**aliases)
        return found

    def set_alias(self, version: Version, alias: Alias) -> None:
        """See `Registry.set_alias`. Raises RegistryError if the version is not there."""
        check_alias(alias)
        name = model_name(version.user_key, version.prefix_name)
        with self._asking(f"set the alias {alias}"):
            self._models.set_registered_model_alias(name, alias, version.version)
            self._make_durable()

    def remove_alias(self, user_key: str, prefix_name: str, alias: Alias) -> None:
        """See `Registry.remove_alias`."""
        check_alias(alias)
        name = model_name(user_key, prefix_name)
        with self._asking(f"remove the alias {alias}"):
            try:
                self._models.delete_registered_model_alias(name, alias)
            except MlflowException as error:
                if not self._is_absent(error, name, alias):
                    raise
            self._make_durable()

    def with_champion(self, prefix_name: str = "default") -> Iterator[str]:
        """See `Registry.with_champion`."""
        token = None
        while True:
            with self._asking("list the champions"):
                page = self._models.search_registered_models(
                    "name LIKE 'ptuning-%'", _PAGE, None, token
                )
            for model in page:
                key = model.name.removeprefix("ptuning-")[:52]
                if "champion" in model.aliases and model.name == model_name(key, prefix_name):
                    yield key
            token = page.token
            if not token:
                return

    # One pack's run: found again by a tag that is written in the same call that creates it.

    def _open_run(self, pack: PackRecord) -> Run:
        key = _pack_key(pack)
        experiment = self._experiment_id()
        found = self._runs.search_runs([experiment], f"tags.`{PACK_TAG}` = '{key}'", max_results=1)
        run = found[0] if found else self._create_run(experiment, pack, key)
        if run.info.status != "FINISHED":
            self._log(run, pack)
        return run

    def _create_run(self, experiment: str, pack: PackRecord, key: str) -> Run:
        tags = {
            PACK_TAG: key,
            "ptuning.run_id": pack.run_id,
            "ptuning.pack_id": pack.pack_id,
        }
        return self._runs.create_run(
            experiment, tags=tags, run_name=f"{pack.run_id}/{pack.pack_id}"
        )

    def _log(self, run: Run, pack: PackRecord) -> None:
        # MLflow refuses a parameter's second value; the run's own start time makes a metric
        # written twice the same point.
        params = [Param(k, str(v)) for k, v in pack.params.items() if k not in run.data.params]
        metrics = [
            Metric(k, float(v), run.info.start_time, 0)
            for k, v in pack.metrics.items()
            if k not in run.data.metrics
        ]
        for start in range(0, max(len(params), len(metrics)), 100):  # 100 parameters a call
            chunk = slice(start, start + 100)
            self._runs.log_batch(run.info.run_id, metrics=metrics[chunk], params=params[chunk])

    def _close_run(self, run: Run) -> None:
        if run.info.status != "FINISHED":
            self._runs.set_terminated(run.info.run_id)

    def _experiment_id(self) -> str:
        found = self._runs.get_experiment_by_name(self.experiment)
        if found is not None:
            return str(found.experiment_id)
        # MLflow's own default for artifacts is relative to whoever comes first.
        place = (self._sqlite.parent / "mlflow-artifacts").as_uri() if self._sqlite else None
        try:
            return str(self._runs.create_experiment(self.experiment, artifact_location=place))
        except MlflowException as error:
            found = self._runs.get_experiment_by_name(self.experiment)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
            return str(found.experiment_id)  # another process was first

    # One user's model.

    def _register_model(
        self, name: str, entries: Mapping[int, Registration], known: _Known | None, run: Run
    ) -> dict[int, Version]:
        if known is None:
            known = _Known()
            self._create_model(name)
        return {
            index: self._register_version(name, entry, known, run)
            for index, entry in entries.items()
        }

    def _create_model(self, name: str) -> None:
        try:
            self._models.create_registered_model(
                name, description="One user's prefixes, a version each. `champion` is served."
            )
        except MlflowException as error:
            # Another writer, or a request that was retried after its answer was lost.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _register_version(self, name: str, entry: Registration, known: _Known, run: Run) -> Version:
        found = known.versions.get(entry.digest)
        if found is None:
            found = self._models.create_model_version(
                name,
                _source(entry.uri, self._remote),
                run.info.run_id,
                tags=_tags(entry),
                description=_description(entry),
                await_creation_for=0,
            )
            known.versions[entry.digest] = found
        version = str(found.version)
        if found.tags.get("gate_digest", "") != entry.gate_digest:  # judged anew
            for tag, value in _judgement(entry).items():
                self._models.set_model_version_tag(name, version, tag, value)
        # `candidate` last: it is what says that a user is done with.
        for alias in ("champion", "candidate") if entry.promote else ("candidate",):
            if known.aliases.get(alias) != version:
                self._models.set_registered_model_alias(name, alias, version)
                known.aliases[alias] = version
        return self._version(found, entry.user_key, entry.prefix_name)

    def _known(self, names: Sequence[str]) -> dict[str, _Known]:
        """What is registered under each of `names`; a name without a model is absent."""
        models = self._find_models(names)
        known = {
            model.name: _Known(aliases={a: str(v) for a, v in model.aliases.items()})
            for model in models
        }
        with_versions = [model.name for model in models if model.latest_versions]
        for found in self._find_versions(with_versions):
            digest = found.tags.get("digest")
            if digest is not None:
                versions = known[found.name].versions
                versions[digest] = min(versions.get(digest, found), found, key=_number)
        return known

    def _aliased(self, models: Sequence[RegisteredModel]) -> dict[tuple[str, str], ModelVersion]:
        """The versions that aliases of `models` point at, by (model's name, version)."""
        # A model brings its latest version along, and most aliases point there. The rest are
        # asked for by number, so that a user's long history is not read for one champion.
        held = {(v.name, str(v.version)): v for model in models for v in model.latest_versions}
        missing: dict[int, list[str]] = {}
        for model in models:
            for number in {str(number) for number in model.aliases.values()}:
                if (model.name, number) not in held:
                    missing.setdefault(int(number), []).append(model.name)
        for wanted, names in missing.items():
            found = self._find_versions(names, f" AND version_number = {wanted}")
            held.update({(v.name, str(v.version)): v for v in found})
        return held

    def _find_models(self, names: Sequence[str]) -> list[RegisteredModel]:
        return self._find(self._models.search_registered_models, names)

    def _find_versions(self, names: Sequence[str], also: str = "") -> list[ModelVersion]:
        return self._find(self._models.search_model_versions, names, also)

    def _find(self, search: Callable[..., Any], names: Sequence[str], also: str = "") -> list[Any]:
        """All that `search` finds under `names` (from `model_name`), a chunk of names a query."""

        def pages(start: int) -> list[Any]:
            quoted = ",".join(f"'{name}'" for name in names[start : start + self._names_per_query])
            found: list[Any] = []
            token = None
            while True:
                page = search(f"name IN ({quoted}){also}", max_results=_PAGE, page_token=token)
                found.extend(page)
                token = page.token
                if not token:
                    return found

        starts = list(range(0, len(names), self._names_per_query))
        return [item for found in self._each(pages, starts) for item in found]

    # How the registry is asked.

    def _each(self, function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
        """`function` of each item, in order; in threads where that is faster. First error wins."""
        if self._workers == 1 or len(items) < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(self._workers, thread_name_prefix="ptuning-registry") as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _is_absent(self, error: MlflowException, name: str, alias: Alias) -> bool:
        """True only if the registry itself says that there is no such model or alias.

        A proxy's 404 also reads as 'does not exist', but comes without MLflow's own answer.
        """
        if not self._answered(error, "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return False
        try:
            model = self._models.get_registered_model(name)
        except MlflowException as second:
            return self._answered(second, "RESOURCE_DOES_NOT_EXIST")
        return alias not in model.aliases

    def _answered(self, error: MlflowException, *codes: str) -> bool:
        return error.error_code in codes and (isinstance(error, RestException) or not self._remote)

    def _version(self, found: ModelVersion | None, user_key: str, prefix_name: str) -> Version:
        tags = found.tags if found is not None else {}
        if found is None or "digest" not in tags:
            raise RegistryError(
                "an alias points at a version that ptuning did not register",
                seen=f"{model_name(user_key, prefix_name)}, tags {sorted(tags)}",
                expected="a version with the tag 'digest'",
                fix="point the alias at a version that a run registered",
                uri=self.shown_uri,
            )
        return Version(
            user_key=user_key,
            prefix_name=prefix_name,
            version=str(found.version),
            digest=tags["digest"],
            uri=tags.get("uri") or found.source or "",
            training_digest=tags.get("training_digest", ""),
            data_digest=tags.get("data_digest", ""),
            gate_digest=tags.get("gate_digest", ""),
            run_id=tags.get("run_id", ""),
            pack_id=tags.get("pack_id", ""),
        )

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Turn what MLflow and the transports under it raise into RegistryError."""
        try:
            yield
        except (
            MlflowException,
            requests.RequestException,
            sqlalchemy.exc.SQLAlchemyError,
            sqlite3.Error,
            OSError,
            ImportError,  # a database's driver
        ) as error:
            raise RegistryError(
                f"could not {what} at {self.shown_uri}",
                seen=f"{type(error).__name__}: {error}",
                fix="check that registry.uri is right and that the registry is up",
                uri=self.shown_uri,
            ) from error

    def _make_durable(self) -> None:
        """On SQLite: all that was committed survives a power cut from here on."""
        if self._sqlite is None:
            return
        # No lock of SQLite's is on this file, so closing it here drops none.
        wal = self._sqlite.with_name(self._sqlite.name + "-wal")
        try:
            handle = os.open(wal, os.O_RDONLY)
        except FileNotFoundError:
            return  # not in WAL mode: each commit was synced
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _by_model(entries: Sequence[Registration]) -> dict[str, dict[int, Registration]]:
    """Entries by model, each under its index; checks all of them."""
    groups: dict[str, dict[int, Registration]] = {}
    for index, entry in enumerate(entries):
        if len(_source(entry.uri, remote=True)) > _MAX_SOURCE:
            raise RegistryError(
                "a prefix file's uri is too long for MLflow",
                seen=f"{len(entry.uri)} characters: {entry.uri[:80]}…",
                expected=f"at most {_MAX_SOURCE}",
                fix="use a shorter --store",
            )
        name = model_name(entry.user_key, entry.prefix_name)
        groups.setdefault(name, {})[index] = entry
    return groups


def _number(version: ModelVersion) -> int:
    return int(version.version)


def _pack_key(pack: PackRecord) -> str:
    """64 hex digits that stand for (run_id, pack_id): safe in a filter, whatever these hold."""
    return hashlib.sha256(f"{pack.run_id}\x1f{pack.pack_id}".encode()).hexdigest()


def _source(uri: str, remote: bool) -> str:
    """The version's `source`: the prefix file's uri.

    An MLflow server refuses local paths outside the run's own artifacts as a source, lest
    somebody reads its disk through it; there a local file is `ptuning-file://` and its
    resolved path, which stays readable to a person. The tag `uri` has it as given.
    """
    parts = urlsplit(uri)
    if not remote or parts.scheme not in ("", "file"):
        return uri
    path = Path(unquote(parts.path) if parts.scheme else uri).resolve()
    return path.as_uri().replace("file://", "ptuning-file://", 1)


def _tags(entry: Registration) -> dict[str, str]:
    figures = {f"metric.{name}": _figure(value) for name, value in entry.metrics.items()}
    # Last, so that no caller's tag says otherwise.
    identity = {
        "digest": entry.digest,
        "data_digest": entry.data_digest,
        "training_digest": entry.training_digest,
        "uri": entry.uri,
        "user_key": entry.user_key,
        "prefix_name": entry.prefix_name,
        **_judgement(entry),
    }
    return {**{key: str(value) for key, value in entry.tags.items()}, **figures, **identity}


def _judgement(entry: Registration) -> dict[str, str]:
    """Tags that change where another gate judges the same prefix."""
    of_run = {
        key: entry.tags[key] for key in ("decision", "run_id", "pack_id") if key in entry.tags
    }
    return {**of_run, "gate_digest": entry.gate_digest}


def _description(entry: Registration) -> str:
    """The version page's markdown: the caller's words, then the figures as a table."""
    parts = [entry.description] if entry.description else []
    if entry.metrics:
        rows = [f"| {name} | {_figure(value)} |" for name, value in entry.metrics.items()]
        parts.append("\n".join(["| figure | value |", "|---|---|", *rows]))
    text = "\n\n".join(parts)
    return text if len(text) <= _MAX_DESCRIPTION else text[: _MAX_DESCRIPTION - 1] + "…"


def _figure(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else str(value)


# Databases.


def _sqlite_path(uri: str) -> Path | None:
    """The absolute path of a `sqlite:///` uri, None for another; ConfigError without a file."""
    if not uri.startswith("sqlite"):
        return None
    database = sqlalchemy.engine.make_url(uri).database
    if not database or database == ":memory:" or database.startswith("file:"):
        raise ConfigError(
            "a registry in SQLite needs a plain file",
            seen=uri,
            expected="sqlite:///path/to/mlflow.db",
            fix="name a file, or use memory:// in tests",
        )
    return Path(database).absolute()


def _with_driver(uri: str) -> str:
    """`postgresql://` with the driver that is installed: SQLAlchemy 2.1's default is psycopg 3."""
    if uri.startswith("postgresql://") and not find_spec("psycopg") and find_spec("psycopg2"):
        return uri.replace("postgresql://", "postgresql+psycopg2://", 1)
    return uri


def _without_password(uri: str) -> str:
    try:
        return sqlalchemy.engine.make_url(uri).render_as_string(hide_password=True)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return f"{urlsplit(uri).scheme}://…"


def _schema_lock(uri: str, sqlite: Path | None) -> Any:
    """Held while a database may get its schema: MLflow's own creation is not safe in a race."""
    if sqlite is not None:
        return _file_lock(sqlite.with_name(sqlite.name + ".lock"))
    return _advisory_lock(uri) if uri.startswith("postgresql") else nullcontext()


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:  # closing it releases the lock, and so does dying
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _advisory_lock(uri: str) -> Iterator[None]:
    # Connecting here also bounds the wait for a database that is down: MLflow tries for 100 s.
    engine = sqlalchemy.create_engine(
        uri, poolclass=sqlalchemy.pool.NullPool, isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:  # closing it releases the lock
        connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({_ADVISORY_LOCK})"))
        yield


def _create_sqlite(path: Path) -> None:
    """Make a fresh database whole or not at all: MLflow's migrations cannot resume half-way."""
    if path.exists():
        return
    fresh = path.with_name(path.name + ".new")
    for leftover in (fresh, fresh.with_name(fresh.name + "-journal")):
        leftover.unlink(missing_ok=True)
    engine = sqlalchemy.create_engine(f"sqlite:///{fresh}")
    _initialize_tables(engine)
    engine.dispose()
    connection = sqlite3.connect(fresh)
    connection.execute("PRAGMA journal_mode=WAL")  # stays in the file
    connection.close()
    fresh.replace(path)


def _sync_once_per_pack(models: ModelRegistryClient) -> None:
    """In WAL mode, let commits wait for `_make_durable` to reach the disk together."""
    engine = models.store.engine
    if not sqlalchemy.event.contains(engine, "connect", _relax):
        sqlalchemy.event.listen(engine, "connect", _relax)
        engine.dispose()  # connections made before the listener


def _relax(connection: Any, _record: object) -> None:
    # NORMAL can lose the last commits in a power cut, and cannot corrupt; without WAL it could.
    if connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
        connection.execute("PRAGMA synchronous=NORMAL")
