"""Prefixes of all methods, mixed in one batch, are served as the library applies them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from method_catalogue import select_served as catalogue_served
from serving import Listener, make_engine, started_of, text_of
from tiny_backbones import FAMILIES, SEQ2SEQ, build, random_prefix

from ptuning.generation import generate
from ptuning.methods.base import Method
from ptuning.methods.prompt import PromptTuning
from ptuning.model.backbone import Backbone
from ptuning.prefix.artifact import Prefix
from ptuning.prefix.ready import make_ready
from serve.engine.engine import HeldPrefix, Request
from serve.events import Delta, Event, Finished, PrefixInfo, Started


def small_window(family: str) -> Any:
    config = FAMILIES[family]()
    config.sliding_window = 6
    return config


CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": FAMILIES["llama"],
    "gpt2": FAMILIES["gpt2"],
    "mistral": lambda: small_window("mistral"),
    "gemma3": lambda: small_window("gemma3"),
}


def serve_answers(
    backbone: Backbone,
    prompts: list[str],
    prefixes: list[Prefix | None],
    tokens: int,
    **engine: int,
) -> list[str]:
    """The engine's greedy answers, with all requests submitted at once."""
    events = collect_events(backbone, prompts, prefixes, [tokens] * len(prompts), **engine)
    return [text_of(own) for own in events]


def collect_events(
    backbone: Backbone,
    prompts: list[str],
    prefixes: list[Prefix | None],
    tokens: list[int],
    **engine: int,
) -> list[list[Event]]:
    running = make_engine(backbone, **engine)
    heard = []
    try:
        for number, (prompt, prefix) in enumerate(zip(prompts, prefixes, strict=True)):
            ids, held = backbone.template.encode_prompt(prompt), None
            if prefix is not None:
                info = PrefixInfo(name="default", version="1", digest=prefix.digest)
                held = HeldPrefix(info=info, ready=make_ready(prefix, backbone))
                ids = held.ready.arrangement.prompt(ids)
            listener = Listener.new()
            request = Request(
                id=f"r{number}",
                prompt=tuple(ids),
                prefix=held,
                max_tokens=tokens[number],
                emit=listener.events.put,
            )
            running.submit(request)
            heard.append(listener)
        events = [listener.wait(60) for listener in heard]
    finally:
        running.close()
    for prefix, own in zip(prefixes, events, strict=True):
        started = started_of(own)
        assert isinstance(started, Started)
        assert (started.prefix.digest if started.prefix else None) == (
            prefix.digest if prefix else None
        )
    return events


def ask_alone(
    backbone: Backbone, methods: dict[str, Method]
) -> tuple[list[str], list[Prefix | None], list[str]]:
    """Prompts, a prefix of each method (and None), and the answer to each prompt alone."""
    prefixes: list[Prefix | None] = [
        random_prefix(backbone, method, seed) for seed, method in enumerate(methods.values())
    ]
    prefixes.append(None)
    prompts = [f"what is number {n} " * (1 + n % 3) for n in range(len(prefixes))]
    alone = [
        generate(backbone, [prompt], [prefix], max_new_tokens=8)[0]
        for prompt, prefix in zip(prompts, prefixes, strict=True)
    ]
    assert generate(backbone, prompts, prefixes, max_new_tokens=8) == alone
    base = generate(backbone, prompts, [None] * len(prompts), max_new_tokens=8)
    changed = sum(answer != plain for answer, plain in zip(alone, base, strict=True))
    assert changed >= len(alone) // 3, "the prefixes change answers"
    return prompts, prefixes, alone


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_all_methods_in_one_batch_answer_as_each_alone(family: str, kind: str) -> None:
    backbone = build(CAUSAL[family](), kind)
    prompts, prefixes, alone = ask_alone(backbone, catalogue_served())
    assert (
        serve_answers(backbone, prompts, prefixes, 8, max_rows=24, prefill_tokens=10_000) == alone
    )
    assert (
        serve_answers(backbone, prompts, prefixes, 8, max_rows=5) == alone
    )  # rows join and leave all the time


def test_a_vote_is_sent_when_it_is_decided_and_its_members_stay_apart() -> None:
    """Its rows change order once a neighbour has left. A vote is sent as one Delta."""
    backbone = build(FAMILIES["llama"]())
    method = PromptTuning(num_virtual_tokens=4, ensemble=3, combine="vote")
    voting = random_prefix(backbone, method, 3)
    prompts, prefixes, tokens = ["to leave early", "to vote"], [None, voting], [5, 8]
    expected = [
        generate(backbone, [prompt], [prefix], max_new_tokens=count)[0]
        for prompt, prefix, count in zip(prompts, prefixes, tokens, strict=True)
    ]
    for rows in (3, 4):  # one after the other, and both at once
        events = collect_events(backbone, prompts, prefixes, tokens, max_rows=rows)
        assert [text_of(own) for own in events] == expected
        started, said, finished = events[1]
        assert isinstance(started, Started)
        assert isinstance(said, Delta)
        assert finished == Finished(reason="length", completion_tokens=8)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_an_encoder_decoder_model_answers_many_users_at_once(family: str) -> None:
    config: Any = SEQ2SEQ[family]()
    config.decoder_start_token_id = 5  # a random model generates nothing after its end token
    backbone = build(config, "eager")
    prompts, prefixes, alone = ask_alone(backbone, catalogue_served(pairs=True))
    assert serve_answers(backbone, prompts, prefixes, 8, max_rows=3) == alone
