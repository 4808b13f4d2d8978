"""Generate text for many users in one batch, each row with its own prefix or none.

The plain version: one batch from start to end, the prefix put before the keys at every
step. `serve/engine.py` is the fast one (rows join and leave between steps); tests hold them
equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from ptuning.artifact import Prefix
from ptuning.attention import RowPrefix
from ptuning.backbone import Backbone
from ptuning.errors import ConfigError, DataError
from ptuning.types import seed_of


def generate(
    backbone: Backbone,
    prompts: Sequence[str],
    prefixes: Sequence[Prefix | None],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    max_length: int = 512,
) -> list[str]:
    """Continue each prompt, encoded as a training prompt, with that row's prefix.

    `temperature` 0 is greedy. A row's random draws depend on `seed` and the row's place and
    on nothing else in the batch. Prompts longer than `max_length` tokens lose their oldest.
    """
    if len(prompts) != len(prefixes):
        raise ConfigError(
            "one prefix or None per prompt",
            seen=f"{len(prompts)} prompts, {len(prefixes)} prefixes",
        )
    if max_new_tokens < 1 or temperature < 0:
        raise ConfigError(
            "max_new_tokens is at least 1 and temperature at least 0",
            seen=f"{max_new_tokens}, {temperature}",
        )
    if not prompts:
        return []
    for prefix in prefixes:
        if prefix is not None:
            prefix.check(backbone)
    encoded = [backbone.template.encode_prompt(prompt, max_length) for prompt in prompts]
    if not all(encoded):
        raise DataError(
            "a prompt has no tokens, so there is nothing to continue",
            seen=f"prompt {encoded.index([])}: {prompts[encoded.index([])]!r}",
            expected="text; this backbone's template puts no token before it",
        )
    ids = _generate_ids(
        backbone, encoded, row_prefix(backbone, prefixes), max_new_tokens, temperature, seed
    )
    return [backbone.template.decode(row) for row in ids]


def row_prefix(backbone: Backbone, prefixes: Sequence[Prefix | None]) -> RowPrefix | None:
    """One batch's prefixes, padded on the left to the longest; None where no row has one."""
    length = max((p.num_virtual_tokens for p in prefixes if p is not None), default=0)
    if not length:
        return None
    visible = torch.zeros((len(prefixes), length), dtype=torch.bool, device=backbone.device)
    layers = {}
    for stack in backbone.facts.stacks:
        shape = backbone.facts.kv_shape(stack, length)
        kv = torch.zeros((len(prefixes), *shape), dtype=backbone.dtype, device=backbone.device)
        for row, prefix in enumerate(prefixes):
            if prefix is not None:
                own = prefix.num_virtual_tokens
                kv[row, ..., length - own :, :] = prefix.kv[stack].to(kv)
                visible[row, length - own :] = True
        layers[stack] = kv.unbind(1)
    return RowPrefix(layers, None if bool(visible.all()) else visible)


def stop_ids(backbone: Backbone) -> set[int]:
    """Tokens that end a completion: the template's end and the model's own."""
    config = getattr(backbone.model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return {backbone.template.end_token_id, *(int(token) for token in listed if token is not None)}


def _generate_ids(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    prefix: RowPrefix | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    rows, longest = len(prompts), max(len(prompt) for prompt in prompts)
    ids = torch.zeros((rows, longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left: the last column is real
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(backbone.device), mask.to(backbone.device)
    start = torch.zeros(rows, dtype=torch.long) if prefix is None else prefix.offsets(rows)
    positions = (mask.cumsum(-1) - 1).clamp_min(0) + start.to(backbone.device)[:, None]
    generators = [torch.Generator().manual_seed(seed_of(seed, "row", row)) for row in range(rows)]
    stops, cache = stop_ids(backbone), DynamicCache()
    done, output = [False] * rows, [[] for _ in range(rows)]  # type: list[bool], list[list[int]]
    for _ in range(max_new_tokens):
        logits = backbone.step(ids, mask, positions, prefix, cache)
        chosen = [_choose(logits[row].cpu(), temperature, generators[row]) for row in range(rows)]
        for row, token in enumerate(chosen):
            done[row] = done[row] or token in stops
            if not done[row]:
                output[row].append(token)
        if all(done):
            break
        ids = torch.tensor(chosen, device=backbone.device)[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    return output


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """The next token of one row from its logits `[V]`."""
    if temperature == 0.0:
        return int(logits.argmax())
    chances = torch.softmax(logits.double() / temperature, dim=-1)
    return int(torch.multinomial(chances, 1, generator=generator))
