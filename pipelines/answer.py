"""Answer prompts with a user's champion in this process: `ptuning generate`."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.champion import load_champion
from pipelines.config import RunConfig
from ptuning.generation import generate
from ptuning.store import Store


def answer_prompts(
    config: RunConfig,
    store: Store,
    user_id: str,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> tuple[list[str], str]:
    """The answers, and a line that names the prefix used."""
    champion = load_champion(config, store, user_id)
    texts = generate(
        champion.backbone,
        prompts,
        [champion.prefix] * len(prompts),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        max_length=config.data.max_length,
    )
    return texts, str(champion)
