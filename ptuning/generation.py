"""Generate text for many users in one batch, each row with its user's prefix or none.

This is the plain version: one batch from start to end, with the prefix put before the keys at
every step. `serve/engine/engine.py` is the fast version, where rows join and leave between steps;
tests check that both give equal results.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ptuning.data.messages import read_message, read_turns
from ptuning.errors import ConfigError, DataError
from ptuning.model.attention_plan import Tokens
from ptuning.model.backbone import Backbone
from ptuning.model.batch import RowPrefix
from ptuning.prefix.artifact import Prefix
from ptuning.prefix.ready import (
    Member,
    ReadyPrefix,
    check_positions,
    combine_logits,
    log_probability,
    make_ready,
    pick_winner,
    rows_of,
)
from ptuning.types import Message, seed_of


def generate(
    backbone: Backbone,
    prompts: Sequence[str | Sequence[Message | Mapping[str, str]]],
    prefixes: Sequence[Prefix | None],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    max_length: int = 512,
) -> list[str]:
    """Continue each prompt, encoded like a training prompt, with the prefix at the same index.

    A prompt is a text, or the messages before the answer (Messages, or mappings like those of a
    file's `messages`).
    `temperature` 0 is greedy. A row's random draws depend only on `seed` and the row's index, not
    on the other rows. Prompts longer than `max_length` tokens lose their oldest tokens. Raises
    ConfigError, DataError or an ArtifactError.

        ptuning.generate(backbone, ["Hi!", "Hi!"], [prefix, None])  # a user's, the base model's
    """
    if len(prompts) != len(prefixes):
        raise ConfigError(
            "generate needs one prefix or None per prompt",
            seen=f"{len(prompts)} prompts, {len(prefixes)} prefixes",
            expected="as many prefixes as prompts",
            fix="pass None for a prompt that the base model should answer",
        )
    if max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise ConfigError(
            "text cannot be generated with these numbers",
            seen=f"max_new_tokens={max_new_tokens}, temperature={temperature}",
            expected="max_new_tokens of at least 1, a finite temperature of at least 0",
            fix="omit them for the defaults, 64 and 0 (greedy)",
        )
    if not prompts:
        return []
    ready = [None if prefix is None else make_ready(prefix, backbone) for prefix in prefixes]
    encoded = [
        backbone.template.encode_prompt(_as_prompt(prompt), max_length) for prompt in prompts
    ]
    if not all(encoded):
        raise DataError(
            "a prompt has no tokens, so there is nothing to continue",
            seen=f"prompt {encoded.index([])}: {prompts[encoded.index([])]!r}",
            expected="text; this backbone's template adds no tokens before it",
        )
    arranged = [
        ids if prefix is None else prefix.arrangement.prompt(ids)
        for ids, prefix in zip(encoded, ready, strict=True)
    ]
    for ids, ready_prefix in zip(arranged, ready, strict=True):
        check_positions(backbone, ready_prefix, ids, max_new_tokens)
    return _generate(backbone, arranged, ready, max_new_tokens, temperature, seed)


def _as_prompt(prompt: str | Sequence[Message | Mapping[str, str]]) -> str | Sequence[Message]:
    if isinstance(prompt, str):
        return prompt
    turns = [vars(turn) if isinstance(turn, Message) else turn for turn in prompt]
    if not turns:
        raise DataError("a prompt has no messages", expected="at least one, from the user")
    return [read_message(turn) for turn in read_turns(turns)]


def stop_ids(backbone: Backbone) -> set[int]:
    """Tokens that end a completion: the template's end token and the model's."""
    ends = {backbone.template.end_token_id}
    model: Any = backbone.model
    for holder in (getattr(model, "generation_config", None), model.config):
        eos = getattr(holder, "eos_token_id", None)
        ends.update(int(t) for t in (eos if isinstance(eos, list) else [eos]) if t is not None)
    return ends


@dataclass
class _Voice:
    """One answer being generated from `rows` rows, whose logits are combined."""

    prompt: int
    rows: int
    alone: bool  # the prompt has no other answer to compare with
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)
    log_p: float = 0.0
    done: bool = False

    def take(self, logits_RV: Tensor, temperature: float, stops: set[int]) -> int:
        """Choose the next token and add it to the answer."""
        logits = combine_logits(logits_RV)
        token = _choose(logits, temperature, self.generator)
        if not self.done:
            self.log_p += 0.0 if self.alone else log_probability(logits, token)
            self.done = token in stops
            if not self.done:
                self.ids.append(token)
        return token

    @property
    def score(self) -> float:
        return self.log_p / (len(self.ids) + self.done)


def _generate(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[ReadyPrefix | None],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
    """Each prompt's answer. An ensemble takes one row per member. With the mean, its rows give one
    answer; with a vote, each row gives an answer and one of them is picked."""
    by_prompt: list[tuple[Member | None, ...]] = [
        (None,) if prefix is None else prefix.members for prefix in prefixes
    ]
    rows = [prompts[n] for n, members in enumerate(by_prompt) for _ in members]
    prefix = rows_of(backbone, [member for members in by_prompt for member in members])
    steps = (_answer_steps if backbone.facts.decoder_start_id is not None else _causal_steps)(
        backbone, rows, prefix
    )
    stops, voices = stop_ids(backbone), _voices(prefixes, seed)
    logits = next(steps)
    for step in range(1, max_new_tokens + 1):
        by_voice = logits.cpu().split([voice.rows for voice in voices])
        chosen = [
            voice.take(logits_RV, temperature, stops)
            for voice, logits_RV in zip(voices, by_voice, strict=True)
        ]
        if step == max_new_tokens or all(voice.done for voice in voices):
            break
        logits = steps.send(
            [token for voice, token in zip(voices, chosen, strict=True) for _ in range(voice.rows)]
        )
    answers_of: list[list[tuple[str, float]]] = [[] for _ in prompts]
    for voice in voices:
        answer = (backbone.template.decode(voice.ids), voice.score)
        answers_of[voice.prompt].append(answer)
    return [answers[pick_winner(answers)][0] for answers in answers_of]


def _voices(prefixes: Sequence[ReadyPrefix | None], seed: int) -> list[_Voice]:
    """The answers to generate, in the order of their rows. Those of one prompt have the same random
    draws and differ only in their ensemble member."""
    voices = []
    for n, prefix in enumerate(prefixes):
        rows, count = (1, 1) if prefix is None else (len(prefix.members), prefix.voices)
        for _ in range(count):
            generator = torch.Generator().manual_seed(seed_of(seed, "row", n))
            voices.append(_Voice(n, rows // count, count == 1, generator))
    return voices


Steps = Generator[Tensor, list[int], None]  # yields logits [R, V], is sent each row's next token


def _causal_steps(
    backbone: Backbone, prompts: Sequence[Sequence[int]], prefix: RowPrefix | None
) -> Steps:
    rows, longest = len(prompts), max(len(prompt) for prompt in prompts)
    ids = torch.zeros((rows, longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left: the last column is real
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(backbone.device), mask.to(backbone.device)
    lengths, cache = mask.sum(-1), DynamicCache()
    while True:
        tokens = Tokens.of_mask(mask, ids.shape[1])
        chosen = yield backbone.step(ids, tokens, prefix, cache, prompt_lengths=lengths)
        ids = torch.tensor(chosen, device=backbone.device)[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)


def _answer_steps(
    backbone: Backbone, prompts: Sequence[Sequence[int]], prefix: RowPrefix | None
) -> Steps:
    """The encoder reads the prompts once; the decoder reads the full answers at every step."""
    start = backbone.facts.decoder_start_id
    assert start is not None
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros((len(prompts), longest), dtype=torch.long, device=backbone.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    encoded = backbone.encode_source(ids, mask, prefix)
    answer = torch.full((len(prompts), 1), start, device=backbone.device)
    while True:
        last = torch.full((len(prompts),), answer.shape[1] - 1, device=backbone.device)
        chosen = yield backbone.answer_step(encoded, mask, answer, prefix, last)
        answer = torch.cat([answer, torch.tensor(chosen, device=backbone.device)[:, None]], dim=1)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """The next token of one row from its logits `[V]`."""
    if temperature == 0.0:
        return int(logits.argmax())
    # The maximum is subtracted first, so that a tiny temperature can only overflow to -inf.
    probabilities = torch.softmax((logits.double() - logits.max()) / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
