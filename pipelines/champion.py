"""A user's champion in this process, for verbs that use one without a service."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config import RunConfig
from ptuning.errors import ConfigError
from ptuning.model.backbone import Backbone
from ptuning.model.load import load_backbone
from ptuning.prefix.artifact import Prefix
from ptuning.registry import open_registry, registry_uri
from ptuning.registry.base import Registry
from ptuning.store import Store, prefix_path
from ptuning.types import user_key


@dataclass(frozen=True)
class Champion:
    """What answers a user: the backbone, and the user's prefix, None where there is none."""

    backbone: Backbone
    name: str
    version: str = ""
    prefix: Prefix | None = None

    def __str__(self) -> str:
        if self.prefix is None:
            return f"{self.backbone.name}, base model (no champion for this user)"
        digest = self.prefix.digest[:12]
        return f"{self.backbone.name}, prefix {self.name} version {self.version} ({digest})"


def load_champion(config: RunConfig, store: Store, user_id: str) -> Champion:
    """Load the backbone and the user's champion from this store.

    Raises ConfigError where no run was made in it, RegistryError where the registry cannot be
    asked, and an ArtifactError for a file that must not be used. Example:
    `load_champion(config, Store("./ptuning-store"), "alice").prefix`.
    """
    registry = open_existing_registry(config, store)
    key, name = user_key(user_id), config.registry.prefix_name
    version = registry.champion(key, name)
    backbone = _load(config)
    if version is None:
        return Champion(backbone, name)
    data = store.read(prefix_path(key, version.digest))
    prefix = Prefix.from_bytes(
        data, backbone, user_key=key, prefix_name=name, digest=version.digest
    )
    return Champion(backbone, name, version.version, prefix)


def open_existing_registry(config: RunConfig, store: Store) -> Registry:
    """The registry of a verb that only reads. A mistyped store must not become a new, empty one
    that answers everybody with the base model."""
    check_has_runs(config, store)
    return open_registry(config.registry, registry_uri(config.registry, store))


def check_has_runs(config: RunConfig, store: Store) -> None:
    """Raise ConfigError where no run can have been made in the store."""
    if config.registry.uri is None and store.is_local and not store.exists("mlflow.db"):
        raise ConfigError(
            "no run has been made in this store",
            seen=store.root,
            expected="a store with an mlflow.db",
            fix="check --store, run `ptuning run` first, or set registry.uri",
        )


def _load(config: RunConfig) -> Backbone:
    chosen = config.backbone
    return load_backbone(
        chosen.name,
        dtype=chosen.dtype,
        attention=chosen.attention,
        device=chosen.device,
        template=config.data.template,
    )
