"""Load a user's champion in this process, for verbs that work without a service."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config import RunConfig
from ptuning.champions import ChampionList
from ptuning.model.backbone import Backbone
from ptuning.model.load import load_backbone
from ptuning.prefix.artifact import Prefix
from ptuning.store import Store, prefix_path
from ptuning.store_identity import read_identity


@dataclass(frozen=True)
class Champion:
    """The model that serves a user: the backbone, and the user's prefix or None."""

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
    """Load the backbone and the user's champion, as this store's service would.

    Raises ConfigError if there has been no run in the store, and an ArtifactError if the prefix
    file must not be used. Example:
    `load_champion(config, Store("./ptuning-store"), "alice").prefix`.
    """
    key, name = read_identity(store).user_key(user_id), config.registry.prefix_name
    backbone = load_backbone(config.backbone, template=config.data.template)
    champions = ChampionList(store, backbone.fingerprint)
    champions.refresh()
    champion = champions.get(key, name)
    if champion is None:
        return Champion(backbone, name)
    data = store.read(prefix_path(key, champion.digest))
    prefix = Prefix.from_bytes(
        data, backbone, user_key=key, prefix_name=name, digest=champion.digest
    )
    return Champion(backbone, name, champion.version, prefix)
