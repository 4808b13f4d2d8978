"""The model registry: a protocol, its MLflow implementation, and a fake for tests.

Importing this package imports neither MLflow nor SQLAlchemy (3 s and 150 MB); they are imported
when a registry that needs them is opened.
"""

from __future__ import annotations

import threading
from urllib.parse import urlsplit

from ptuning.errors import ConfigError
from ptuning.registry.base import (
    Current,
    PackRecord,
    Registration,
    Registry,
    RegistryConfig,
    Version,
)
from ptuning.registry.memory import MemoryRegistry, MemoryServer
from ptuning.registry.names import Alias, Scope, sqlite_uri
from ptuning.store import Store

__all__ = [
    "Alias",
    "Current",
    "MemoryRegistry",
    "MemoryServer",
    "PackRecord",
    "Registration",
    "Registry",
    "RegistryConfig",
    "Scope",
    "Version",
    "open_registry",
    "registry_uri",
]


def registry_uri(config: RegistryConfig, store: Store) -> str:
    """The URI of the configured registry, or else of the one embedded in the store: SQLite, which
    needs a local directory. Raises ConfigError if there is neither."""
    if config.uri is not None:
        return config.uri
    if not store.is_local:
        raise ConfigError(
            "a store that is not a local directory cannot contain the embedded registry",
            seen=store.root,
            fix="set registry.uri to an MLflow server or database",
        )
    return sqlite_uri(store.path("mlflow.db"))


_MLFLOW_SCHEMES = frozenset({"http", "https", "postgresql", "sqlite"})
_named: dict[str, MemoryServer] = {}
_named_lock = threading.Lock()


def open_registry(
    config: RegistryConfig,
    default_uri: str,
    *,
    namespace: str,
    fingerprint: str,
    store_id: str,
) -> Registry:
    """Open the registry at `config.uri`, or at `default_uri` if that is not set, for the names of
    one store and one backbone.

    `namespace` and `store_id` come from the store's identity (`ptuning.store_identity`),
    `fingerprint` is `Backbone.fingerprint`.

    `sqlite:///…`, `postgresql[+driver]://…` and `http[s]://…` are MLflow's. For tests,
    `memory://NAME` is one server per name in this process, and `memory://` a new one each time.
    Raises ConfigError for any other scheme and RegistryError for a database that cannot be opened.
    A server is not contacted, and the owner of the namespace not checked, before the first call.
    """
    scope = Scope(namespace, fingerprint, store_id)
    uri = config.uri or default_uri
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme == "memory":
        return MemoryRegistry(scope, _memory_server(uri))
    if scheme not in _MLFLOW_SCHEMES:
        raise ConfigError(
            "registry.uri has a scheme that is not supported",
            seen=repr(scheme or uri),
            expected="http(s)://…, postgresql://…, sqlite:///… or memory://…",
            fix="set registry.uri; a file is sqlite:/// followed by its path",
        )
    return _open_mlflow(uri, config.experiment, scope)


def _open_mlflow(uri: str, experiment: str, scope: Scope) -> Registry:
    from ptuning.system import environment

    environment.set_defaults()  # MLflow reads some of them at import
    from ptuning.registry.mlflow.registry import MlflowRegistry

    return MlflowRegistry(uri, experiment, scope)


def _memory_server(uri: str) -> MemoryServer:
    if not urlsplit(uri).netloc:
        return MemoryServer()
    with _named_lock:
        return _named.setdefault(uri, MemoryServer())
