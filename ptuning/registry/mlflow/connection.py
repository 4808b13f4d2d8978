"""A connection to MLflow: clients, concurrency, and the meaning of MLflow's errors."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import requests
import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException
from mlflow.tracking._model_registry.client import ModelRegistryClient

from ptuning.errors import RegistryError, RegistryUnreachable
from ptuning.registry.mlflow.databases import (
    create_sqlite,
    lock_schema,
    sqlite_path,
    sync_once_per_pack,
    with_driver,
    without_password,
)
from ptuning.registry.mlflow.quiet import quiet_outages

log = logging.getLogger("ptuning.registry")

_T = TypeVar("_T")
_R = TypeVar("_R")
_NAMES_PER_QUERY = 200
_NAMES_PER_URL = 50  # 3.5 to 8 kB of query string; servers allow 8 kB or more
_WORKERS = 4
# What PostgreSQL, SQLite and MySQL say of a row that is there already, in MLflow's words.
_TAKEN = ("UniqueViolation", "UNIQUE constraint failed", "Duplicate entry")


class Outage:
    """Tracks whether the registry answers, to log once when it stops and once when it is back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._down = False

    def began(self) -> bool:
        """Record a failure; True if it is the first."""
        with self._lock:
            began, self._down = not self._down, True
            return began

    def ended(self) -> bool:
        """Record an answer; True if it is the first after a failure."""
        if not self._down:
            return False
        with self._lock:
            ended, self._down = self._down, False
            return ended


@dataclass
class Connection:
    """Clients of one MLflow and how to use them. `sqlite` is the database file, for SQLite;
    `remote` means that MLflow is behind an HTTP server."""

    uri: str
    shown_uri: str
    sqlite: Path | None
    remote: bool
    workers: int
    names_per_query: int
    runs: Any = None
    models: Any = None
    outage: Outage = field(default_factory=Outage)

    def map(self, function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
        """Apply `function` to each item, in threads if that is faster; results are in order. Raises
        the first error."""
        if self.workers == 1 or len(items) < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(self.workers, thread_name_prefix="ptuning-registry") as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def write(self, call: Callable[..., _R], *arguments: Any) -> _R:
        """A call that writes one row; once more where another writer put the row there first.

        MLflow looks for an alias or a tag and then inserts it: of two writers one finds it taken.
        The row is there now, and the second call moves it.
        """
        try:
            return call(*arguments)
        except MlflowException as error:
            if not any(sign in str(error) for sign in _TAKEN):
                raise
            return call(*arguments)

    def is_answer(self, error: MlflowException, *codes: str) -> bool:
        """Whether an error is a response from MLflow with one of these codes. (A proxy's 404 also
        looks like 'does not exist', but has no code.)"""
        return error.error_code in codes and (_from_server(error) or not self.remote)

    def _is_outage(self, error: Exception) -> bool:
        if not isinstance(error, MlflowException) or (self.remote and not _from_server(error)):
            return True
        return not str(error.error_code).startswith(("RESOURCE_", "INVALID_"))

    @contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Convert errors of MLflow and of the transports below it to RegistryError."""
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
            is_outage = self._is_outage(error)
            if is_outage and self.outage.began():
                log.warning("could not %s at %s: %s", what, self.shown_uri, _first_line(error))
            raise (RegistryUnreachable if is_outage else RegistryError)(
                f"could not {what} at {self.shown_uri}",
                seen=f"{type(error).__name__}: {error}",
                fix="check that registry.uri is right and that the registry is up",
                uri=self.shown_uri,
            ) from error
        if self.outage.ended():
            log.warning("the registry at %s answers again", self.shown_uri)


def connect(uri: str) -> Connection:
    """Open `sqlite:///`, `postgresql://` or `http(s)://`.

    The first process to open a new database creates its schema here. Raises RegistryError if it
    cannot be opened. A server is not contacted before the first call.
    """
    sqlite = sqlite_path(uri)
    remote = uri.startswith(("http://", "https://"))
    uri = with_driver(uri)
    to = Connection(
        uri=uri,
        shown_uri=without_password(uri),
        sqlite=sqlite,
        remote=remote,
        # SQLite allows one writer; elsewhere most of a call is waiting.
        workers=1 if sqlite else _WORKERS,
        names_per_query=_NAMES_PER_URL if remote else _NAMES_PER_QUERY,
    )
    quiet_outages()
    with to.asking("open the registry"), lock_schema(uri, sqlite):
        if sqlite:
            create_sqlite(sqlite)
        to.runs = MlflowClient(tracking_uri=uri, registry_uri=uri)
        to.models = ModelRegistryClient(uri, uri)
        if sqlite:
            sync_once_per_pack(to.models)
    return to


def _from_server(error: MlflowException) -> bool:
    return isinstance(error, RestException)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
