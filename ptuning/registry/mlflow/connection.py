"""One open MLflow: its clients, how many calls at once, and what its errors mean."""

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

from ptuning.errors import RegistryError
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
_NAMES_PER_URL = 50  # 3.5 to 8 kB of query string; servers cut at 8 or more
_WORKERS = 4
# What PostgreSQL, SQLite and MySQL say of a row that is there already, in MLflow's words.
_TAKEN = ("UniqueViolation", "UNIQUE constraint failed", "Duplicate entry")


class Outage:
    """Whether the registry answers: what is logged once when it stops, and when it is back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._down = False

    def began(self) -> bool:
        """Note a failure; True if it is the first one."""
        with self._lock:
            began, self._down = not self._down, True
            return began

    def ended(self) -> bool:
        """Note an answer; True if it is the first one after a failure."""
        if not self._down:
            return False
        with self._lock:
            ended, self._down = self._down, False
            return ended


@dataclass
class Connection:
    """Clients of one MLflow and how to ask them. `sqlite` is the database's file, if it is one;
    `remote` says that there is an HTTP server between."""

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
        """`function` of each item, in order; in threads where that is faster. First error wins."""
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
        """Whether an error is MLflow's own answer with one of these codes: a proxy's 404 also
        reads as 'does not exist', but comes without one."""
        return error.error_code in codes and (_from_server(error) or not self.remote)

    def _is_outage(self, error: Exception) -> bool:
        if not isinstance(error, MlflowException) or (self.remote and not _from_server(error)):
            return True
        return not str(error.error_code).startswith(("RESOURCE_", "INVALID_"))

    @contextmanager
    def asking(self, what: str) -> Iterator[None]:
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
            if self._is_outage(error) and self.outage.began():
                log.warning("could not %s at %s: %s", what, self.shown_uri, _first_line(error))
            raise RegistryError(
                f"could not {what} at {self.shown_uri}",
                seen=f"{type(error).__name__}: {error}",
                fix="check that registry.uri is right and that the registry is up",
                uri=self.shown_uri,
            ) from error
        if self.outage.ended():
            log.warning("the registry at %s answers again", self.shown_uri)


def connect(uri: str) -> Connection:
    """Open `sqlite:///`, `postgresql://` or `http(s)://`.

    A fresh database gets its schema here, once, whoever comes first; RegistryError if it cannot
    be opened. A server is asked when it is first needed.
    """
    sqlite = sqlite_path(uri)
    remote = uri.startswith(("http://", "https://"))
    uri = with_driver(uri)
    to = Connection(
        uri=uri,
        shown_uri=without_password(uri),
        sqlite=sqlite,
        remote=remote,
        # SQLite has one writer; elsewhere most of a call is waiting for the answer.
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
