"""A user's champion in this process, for verbs that use one without a service."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config import RunConfig
from ptuning.model.backbone import Backbone
from ptuning.model.fingerprint import fingerprint_of
from ptuning.model.load import load_backbone, read_config
from ptuning.model.locate import locate
from ptuning.prefix.artifact import Prefix
from ptuning.registry import open_registry, registry_uri
from ptuning.store import Store, prefix_path
from ptuning.store_identity import read_identity


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
    identity = read_identity(store)
    key, name = identity.user_key(user_id), config.registry.prefix_name
    uri = registry_uri(config.registry, store)
    source = locate(config.backbone.name)
    registry = open_registry(
        config.registry,
        uri,
        namespace=identity.namespace,
        fingerprint=fingerprint_of(source, read_config(source)),
        store_id=identity.store_id,
    )
    version = registry.champion(key, name)
    backbone = load_backbone(config.backbone, template=config.data.template)
    if version is None:
        return Champion(backbone, name)
    data = store.read(prefix_path(key, version.digest))
    prefix = Prefix.from_bytes(
        data, backbone, user_key=key, prefix_name=name, digest=version.digest
    )
    return Champion(backbone, name, version.version, prefix)
