"""The run's only contact with the service: its configuration, starting it, what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ptuning.errors import ConfigError, RunError
from ptuning.registry import registry_uri
from ptuning.registry.base import Registry
from ptuning.store import Store
from serve.config import ServeConfig

if TYPE_CHECKING:
    from pipelines.config import RunConfig

__all__ = ["ServeConfig", "deploy", "registry_of", "serve_forever"]


def deploy(registry: Registry, promoted: Mapping[str, str], prefix_name: str) -> None:
    """Check that what the service will read is what this run promoted (user key to digest).

    Nothing is pushed: a running service looks the `champion` alias up at least every
    `serve.refresh_seconds`, so the alias is the deployment. Raises RunError where an alias
    does not point at the promoted prefix.
    """
    current = registry.current(promoted, prefix_name)
    astray = []
    for key, digest in promoted.items():
        now = current.get(key)
        champion = now.champion if now else None
        if champion is None or champion.digest != digest:
            astray.append(key)
    if astray:
        raise RunError(
            "promoted prefixes are not the registry's champions",
            seen=f"{len(astray)} of {len(promoted)} users, such as {astray[0]}",
            fix="another run may have promoted meanwhile; run again to compare with it",
        )


def registry_of(config: RunConfig, store: Store) -> str:
    """URI of the registry that a reading verb uses. A mistyped store must not become a new,
    empty one that answers everybody with the base model."""
    if config.registry.uri is None and store.is_local and not store.exists("mlflow.db"):
        raise ConfigError(
            "no run has been made in this store",
            seen=store.root,
            expected="a store with an mlflow.db",
            fix="check --store, run `ptuning run` first, or set registry.uri",
        )
    return registry_uri(config.registry, store)


def serve_forever(config: RunConfig, store: str) -> None:
    """Run the service until it is stopped."""
    import serve.app

    registry_of(config, Store(store))
    serve.app.run(
        config.serve,
        store=Store(store).root,
        backbone=config.backbone,
        template=config.data.template,
        registry=config.registry,
    )
