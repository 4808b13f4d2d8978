"""Answer prompts with a user's champion in this process: `ptuning generate`."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.candidates.publish import registry_of
from pipelines.config import RunConfig
from ptuning.generation import generate
from ptuning.model.load import load_backbone
from ptuning.prefix.artifact import Prefix
from ptuning.registry import open_registry
from ptuning.store import Store, read_uri
from ptuning.types import user_key


def answer(
    config: RunConfig,
    store_root: str,
    user_id: str,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> tuple[list[str], str]:
    """The answers, and a line that says which prefix gave them."""
    store = Store(store_root)
    registry = open_registry(config.registry, registry_of(config, store))
    key, name = user_key(user_id), config.registry.prefix_name
    champion = registry.champion(key, name)
    chosen = config.backbone
    backbone = load_backbone(
        chosen.name,
        dtype=chosen.dtype,
        attention=chosen.attention,
        device=chosen.device,
        template=config.data.template,
    )
    prefix = None
    served_by = f"{backbone.name}, base model (no champion for this user)"
    if champion is not None:
        prefix = Prefix.from_bytes(
            read_uri(champion.uri), backbone, user_key=key, prefix_name=name, digest=champion.digest
        )
        served_by = (
            f"{backbone.name}, prefix {name} version {champion.version} ({champion.digest[:12]})"
        )
    texts = generate(
        backbone,
        prompts,
        [prefix] * len(prompts),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        max_length=config.data.max_length,
    )
    return texts, served_by
