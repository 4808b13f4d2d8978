"""The databases below MLflow: drivers, creation of the schema, durability.

Speed on SQLite, with two aliases and a dozen tags per user, on two busy cores: 43 users/s through
`MlflowClient`, whose `set_registered_model_alias` first reads the full model to check that it is
not a prompt; 58 through `ModelRegistryClient`; 78 with the embedded database in WAL mode; 103 with
one fsync per `register` instead of one per commit. WAL needs all processes on one host; several
hosts need a server.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy
from mlflow.store.db.utils import _initialize_tables
from mlflow.tracking._model_registry.client import ModelRegistryClient

from ptuning.errors import ConfigError
from ptuning.registry.names import sqlite_uri

_ADVISORY_LOCK = 0x7074756E  # "ptun"


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of a `sqlite:///` URI, or None for another scheme. Raises ConfigError if
    the URI names no file."""
    if not uri.startswith("sqlite"):
        return None
    database = sqlalchemy.engine.make_url(uri).database
    if not database or database == ":memory:" or database.startswith("file:"):
        raise ConfigError(
            "a SQLite registry needs a plain file",
            seen=uri,
            expected="sqlite:///path/to/mlflow.db",
            fix="name a file, or use memory:// in tests",
        )
    return Path(database).absolute()


def with_driver(uri: str) -> str:
    """Add the installed driver to `postgresql://`: SQLAlchemy 2.1's default is psycopg 3."""
    if uri.startswith("postgresql://") and not find_spec("psycopg") and find_spec("psycopg2"):
        return uri.replace("postgresql://", "postgresql+psycopg2://", 1)
    return uri


def without_password(uri: str) -> str:
    """The URI with its password hidden."""
    try:
        return sqlalchemy.engine.make_url(uri).render_as_string(hide_password=True)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return f"{urlsplit(uri).scheme}://…"


def lock_schema(uri: str, sqlite: Path | None) -> Any:
    """A lock to hold while the schema may be created: MLflow's creation is not safe in a race."""
    if sqlite is not None:
        return _lock_file(sqlite.with_name(sqlite.name + ".lock"))
    return _lock_postgresql(uri) if uri.startswith("postgresql") else nullcontext()


@contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:  # closing it releases the lock, and so does a crash
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _lock_postgresql(uri: str) -> Iterator[None]:
    # Connecting here also limits the wait for a database that is down: MLflow tries for 100 s.
    engine = sqlalchemy.create_engine(
        uri, poolclass=sqlalchemy.pool.NullPool, isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:  # closing it releases the lock
        connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({_ADVISORY_LOCK})"))
        yield


def create_sqlite(path: Path) -> None:
    """Create a new database atomically: MLflow's migrations cannot resume half-way."""
    if path.exists():
        return
    fresh = path.with_name(path.name + ".new")
    for leftover in (fresh, fresh.with_name(fresh.name + "-journal")):
        leftover.unlink(missing_ok=True)
    engine = sqlalchemy.create_engine(sqlite_uri(str(fresh)))
    _initialize_tables(engine)
    engine.dispose()
    connection = sqlite3.connect(fresh)
    connection.execute("PRAGMA journal_mode=WAL")  # recorded in the file
    connection.close()
    fresh.replace(path)


def sync_once_per_pack(models: ModelRegistryClient) -> None:
    """In WAL mode, do not sync each commit; `make_durable` syncs them together."""
    engine = models.store.engine
    if not sqlalchemy.event.contains(engine, "connect", _relax):
        sqlalchemy.event.listen(engine, "connect", _relax)
        engine.dispose()  # connections made before the listener


def make_durable(path: Path | None) -> None:
    """On SQLite, make all commits so far survive a power cut."""
    if path is None:
        return
    # SQLite has no lock on this file, so closing it here releases none.
    wal = path.with_name(path.name + "-wal")
    try:
        handle = os.open(wal, os.O_RDONLY)
    except FileNotFoundError:
        return  # not in WAL mode: each commit was synced
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _relax(connection: Any, _record: object) -> None:
    # In WAL mode NORMAL can lose the last commits in a power cut, but never corrupts the database.
    if connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
        connection.execute("PRAGMA synchronous=NORMAL")
