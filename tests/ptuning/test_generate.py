"""Many users in one batch: each row is as if alone, with its user's prefix or none."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_backbones import (
    FAMILIES,
    as_groups,
    as_layers,
    build,
    build_model,
    logits_of,
    prefix_rows,
    random_kv,
    random_prefix,
)
from tiny_model import make_tokenizer
from tokenizers import processors

from ptuning.errors import BackboneError, ConfigError, CorruptArtifact, DataError, WrongBackbone
from ptuning.generation import generate, stop_ids
from ptuning.methods.prefix import PrefixTuning
from ptuning.methods.prompt import PromptTuning
from ptuning.model.backbone import Backbone
from ptuning.model.batch import EMBEDDINGS
from ptuning.model.facts import DECODER
from ptuning.prefix.artifact import Prefix, PrefixMeta, make_prefix
from ptuning.prefix.ready import combine_logits, make_ready, pick_winner, rows_of
from ptuning.types import Message

PROMPTS = ["hello there", "the quick brown fox jumps over", "how", "are you today? the lazy dog"]


def prefix_for(backbone: Backbone, length: int, seed: int) -> Prefix:
    method = PrefixTuning(num_virtual_tokens=length)
    meta = PrefixMeta.of(backbone, method, user_key=f"user-{seed}")
    return make_prefix([as_groups(random_kv(backbone, length, seed)[0])], meta)


def greedy_ids(backbone: Backbone, prompt: list[int], prefix: Prefix, count: int) -> list[int]:
    (member,) = make_ready(prefix, backbone).members
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            (logits,) = logits_of(backbone, [ids], rows_of(backbone, [member]))
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :]


def prefixes_for(backbone: Backbone) -> list[Prefix | None]:
    """Three users with prefixes of different lengths, and the base model."""
    return [
        prefix_for(backbone, 3, 1),
        None,
        prefix_for(backbone, 7, 2),
        prefix_for(backbone, 1, 3),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_a_mixed_batch_gives_each_row_what_it_gets_alone(family: str, kind: str) -> None:
    backbone = build(FAMILIES[family](), kind)
    prefixes = prefixes_for(backbone)
    together = generate(backbone, PROMPTS, prefixes, max_new_tokens=8)
    alone = [
        generate(backbone, [prompt], [prefix], max_new_tokens=8)[0]
        for prompt, prefix in zip(PROMPTS, prefixes, strict=True)
    ]
    assert together == alone
    assert len(set(together)) > 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mistral"])
def test_greedy_steps_equal_whole_passes_over_the_growing_text(family: str) -> None:
    """Checks the cache, the window and the positions after the first step."""
    config = FAMILIES[family]()
    if getattr(config, "sliding_window", None):
        config.sliding_window = 6
    backbone = build(config)
    prefix = prefix_for(backbone, 4, 1)
    ids = backbone.template.encode_prompt(PROMPTS[1])
    expected: list[int] = []
    kv = prefix_rows(backbone, [prefix])
    for _ in range(12):
        with torch.no_grad():
            (logits,) = logits_of(backbone, [[*ids, *expected]], kv)
        token = int(logits[-1].argmax())
        if token in stop_ids(backbone):
            break
        expected.append(token)
    text = generate(backbone, [PROMPTS[1]], [prefix], max_new_tokens=12)[0]
    assert text == backbone.template.decode(expected)


def test_a_row_without_a_prefix_is_the_plain_models_greedy_generation() -> None:
    backbone = build(FAMILIES["llama"]())
    ids = backbone.template.encode_prompt(PROMPTS[0])
    output = build_model(FAMILIES["llama"](), "eager").generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
        max_new_tokens=10,
        do_sample=False,
    )
    expected = backbone.template.decode(output[0, len(ids) :].tolist())
    prefixes = [None, prefix_for(backbone, 5, 1)]
    ours = generate(backbone, [PROMPTS[0], PROMPTS[1]], prefixes, max_new_tokens=10)
    assert ours[0] == expected


def test_a_prompt_may_be_messages() -> None:
    backbone = build(FAMILIES["llama"]())
    turn = {"role": "user", "content": PROMPTS[1]}
    text = backbone.template.decode(backbone.template.encode_prompt([Message(**turn)]))
    assert PROMPTS[1] in text
    given = generate(backbone, [[turn], [Message(**turn)], text], [None] * 3, max_new_tokens=4)
    assert given[0] == given[1] == given[2]
    for bad in ([], [{"role": "user"}]):
        with pytest.raises(DataError, match="message"):
            generate(backbone, [bad], [None])


def test_the_prefix_decides_the_text() -> None:
    strong = build(FAMILIES["llama"]())
    prefixes: list[Prefix | None] = [None, prefix_for(strong, 4, 1), prefix_for(strong, 4, 2)]
    texts = generate(strong, [PROMPTS[0]] * 3, prefixes, max_new_tokens=12)
    assert len(set(texts)) == 3


def test_sampled_rows_depend_on_seed_and_place_and_on_no_neighbour() -> None:
    backbone = build(FAMILIES["llama"]())
    prefixes = prefixes_for(backbone)

    def sample(prompts: list[str], chosen: list[Prefix | None], seed: int = 0) -> list[str]:
        return generate(backbone, prompts, chosen, max_new_tokens=10, temperature=1.0, seed=seed)

    first = sample(PROMPTS, prefixes)
    assert sample(PROMPTS, prefixes) == first
    torch.manual_seed(99)  # nor on the process's random state
    others = ["the", PROMPTS[1], "fox fox fox", "you"]
    assert sample(others, [None, *prefixes[1:2], None, None])[1] == first[1]
    assert sample(PROMPTS[:2], prefixes[:2]) == first[:2]
    assert sample(PROMPTS, prefixes, seed=1) != first
    same = sample([PROMPTS[0]] * 4, [prefixes[0]] * 4)
    assert len(set(same)) > 1, "rows with the same prompt must draw different numbers"


def test_a_low_temperature_is_nearly_greedy() -> None:
    backbone = build(FAMILIES["llama"]())
    prefixes = prefixes_for(backbone)
    greedy = generate(backbone, PROMPTS, prefixes, max_new_tokens=6)
    cold = generate(backbone, PROMPTS, prefixes, max_new_tokens=6, temperature=1e-6)
    assert cold == greedy


def test_generation_stops_at_the_end_token_of_each_row_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = build(FAMILIES["llama"]())
    prefixes = prefixes_for(backbone)
    free = generate(backbone, PROMPTS, prefixes, max_new_tokens=8)
    ids = backbone.template.encode_prompt(PROMPTS[0])
    with torch.no_grad():
        (logits,) = logits_of(backbone, [ids], prefix_rows(backbone, prefixes[:1]))
    first = int(logits[-1].argmax())
    module = sys.modules["ptuning.generation"]  # `ptuning.generation` is the function
    monkeypatch.setattr(module, "stop_ids", lambda _backbone: {first})
    stopped = generate(backbone, PROMPTS, prefixes, max_new_tokens=8)
    assert stopped[0] == ""
    for ours, whole in zip(stopped, free, strict=True):
        assert whole.startswith(ours)
    assert any(stopped), "the others continue"


def test_at_most_max_new_tokens_are_generated() -> None:
    backbone = build(FAMILIES["llama"]())
    texts = [
        generate(backbone, PROMPTS[:1], [None], max_new_tokens=count)[0] for count in (1, 4, 9)
    ]
    assert texts[1].startswith(texts[0])
    assert texts[2].startswith(texts[1])


def test_long_prompts_lose_their_oldest_tokens() -> None:
    backbone = build(FAMILIES["llama"]())
    short = "the lazy dog"
    room = len(backbone.template.encode_prompt(short))
    cut = generate(backbone, ["x" * 50 + short], [None], max_new_tokens=6, max_length=room)
    assert cut == generate(backbone, [short], [None], max_new_tokens=6)


def test_no_prompts_give_no_answers(backbone: Backbone) -> None:
    assert generate(backbone, [], []) == []


@pytest.mark.parametrize(
    ("options", "prefixes"),
    [
        ({}, []),
        ({"max_new_tokens": 0}, [None]),
        ({"temperature": -1.0}, [None]),
        ({"temperature": float("nan")}, [None]),
        ({"temperature": float("inf")}, [None]),
    ],
)
def test_impossible_requests_are_errors(
    backbone: Backbone, options: dict[str, Any], prefixes: list[None]
) -> None:
    with pytest.raises(ConfigError) as caught:
        generate(backbone, ["hello"], prefixes, **options)
    assert caught.value.expected
    assert caught.value.fix


def test_the_smallest_temperature_is_greedy(backbone: Backbone) -> None:
    greedy, sampled = (
        generate(backbone, ["hello"], [None], max_new_tokens=6, temperature=temperature)
        for temperature in (0.0, 5e-324)
    )
    assert sampled == greedy


def test_a_prompt_without_tokens_is_an_error_not_a_broken_batch() -> None:
    backbone = build(FAMILIES["gpt2"]())
    backbone.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    bare = Backbone(backbone.model, backbone.tokenizer, name="bare", fingerprint="0")
    for prompts in ([""], ["hello", ""]):
        with pytest.raises(DataError, match="no tokens"):
            generate(bare, prompts, [None] * len(prompts))


def test_a_prefix_of_another_backbone_is_refused_before_anything_runs(backbone: Backbone) -> None:
    other = build(FAMILIES["gpt2"]())
    with pytest.raises(WrongBackbone):
        generate(backbone, PROMPTS[:2], [None, prefix_for(other, 3, 1)])


def test_mixed_lengths_are_padded_on_the_left_and_hidden(backbone: Backbone) -> None:
    prefixes = prefixes_for(backbone)
    made = prefix_rows(backbone, prefixes)
    assert made is not None
    assert made.length == 7
    assert made.lengths is not None
    assert made.lengths.tolist() == [3, 0, 7, 1]
    first = prefixes[0]
    assert first is not None
    for (keys, values), wanted in zip(made.layers[DECODER], as_layers(first.tensors), strict=True):
        assert torch.equal(keys[0, :, -3:], wanted[0])
        assert torch.equal(values[0, :, -3:], wanted[1])
    assert prefix_rows(backbone, [None, None]) is None
    equal = prefix_rows(backbone, [first, first])
    assert equal is not None
    assert equal.lengths is None


def test_the_templates_end_and_the_models_own_ends_both_stop(backbone: Backbone) -> None:
    tokenizer = make_tokenizer()
    assert stop_ids(backbone) == {tokenizer.eos_token_id}
    strong = build(FAMILIES["llama"]())
    strong.model.generation_config.eos_token_id = [5, 9]  # type: ignore[union-attr]
    assert stop_ids(strong) == {5, 9, tokenizer.eos_token_id}


def one_member(prefix: Prefix, member: int) -> Prefix:
    """An ensemble's member as a separate prefix."""
    method = prefix.method.model_copy(update={"ensemble": 1})  # type: ignore[attr-defined]
    return make_prefix([prefix.members[member]], replace(prefix.meta, method=method))


def answer_greedily(
    backbone: Backbone, prompt: str, prefix: Prefix, stops: set[int]
) -> tuple[str, float]:
    """The greedy answer of at most 8 tokens and its mean log-probability, without a cache."""
    (member,) = make_ready(prefix, backbone).members
    ids = backbone.template.encode_prompt(prompt)
    answer: list[int] = []
    log_p: list[float] = []
    rows = rows_of(backbone, [member])
    while len(log_p) < 8:
        with torch.no_grad():
            (logits,) = logits_of(backbone, [[*ids, *answer]], rows)
        best = logits[-1].log_softmax(-1).max(-1)
        log_p.append(float(best.values))
        if int(best.indices) in stops:
            break
        answer.append(int(best.indices))
    return backbone.template.decode(answer), sum(log_p) / len(log_p)


@pytest.mark.parametrize("winner", ["the commonest", "the likeliest"])
def test_an_ensemble_votes_on_whole_answers(winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each member answers as if alone, some longer than others, beside other rows."""
    backbone = build(FAMILIES["llama"]())
    method = PromptTuning(num_virtual_tokens=3, ensemble=4, combine="vote")
    prefix = random_prefix(backbone, method, 5)
    first, second, third, _ = (member[EMBEDDINGS] for member in prefix.members)
    order = (first, second, third, third)
    if winner == "the likeliest":
        order = (first, second, third, random_prefix(backbone, method, 6).members[0][EMBEDDINGS])
    prefix = make_prefix([{EMBEDDINGS: values} for values in order], prefix.meta)
    alone = [one_member(prefix, member) for member in range(4)]
    # The first member's answer ends after two tokens.
    begun = backbone.template.encode_prompt(PROMPTS[0])
    stops = {greedy_ids(backbone, begun, alone[0], 3)[2]}
    monkeypatch.setattr(sys.modules["ptuning.generation"], "stop_ids", lambda _: stops)
    answers = [answer_greedily(backbone, PROMPTS[0], one, stops) for one in alone]
    texts = [text for text, _ in answers]
    assert len(set(texts)) == (3 if winner == "the commonest" else 4)
    best = max(answers, key=lambda one: one[1])[0]
    expected = texts[2] if winner == "the commonest" else best
    others = prefixes_for(backbone)
    prompts = [PROMPTS[0], *PROMPTS]
    together = generate(backbone, prompts, [prefix, *others], max_new_tokens=8)
    assert together[0] == expected
    assert together[1:] == generate(backbone, PROMPTS, others, max_new_tokens=8)
    assert [generate(backbone, PROMPTS[:1], [one], max_new_tokens=8)[0] for one in alone] == texts


def test_a_vote_is_won_by_votes_then_likelihood_then_order() -> None:
    assert pick_winner([("a", -0.1), ("b", -2.0), ("b", -3.0)]) == 1
    assert pick_winner([("a", -2.0), ("b", -1.0), ("c", -3.0)]) == 1
    assert pick_winner([("a", -3.0), ("b", -2.0), ("a", -1.0), ("b", -2.5)]) == 2
    assert pick_winner([("a", -1.0), ("b", -1.0)]) == 0


@pytest.mark.parametrize("combine", ["mean", "vote"])
def test_a_prefix_that_overflows_in_the_model_gives_no_answer(combine: Any) -> None:
    """Its values are finite in the file, but its keys and values in the model are not."""
    backbone = build(FAMILIES["gpt2"]())
    prefix = random_prefix(
        backbone, PromptTuning(num_virtual_tokens=2, ensemble=3, combine=combine), 1
    )
    first, _, last = (member[EMBEDDINGS] for member in prefix.members)
    values = [first, torch.full_like(first, 1e30), last]
    sick = make_prefix([{EMBEDDINGS: one} for one in values], prefix.meta)
    sick.check(backbone)
    with pytest.raises(CorruptArtifact, match="overflow"):
        generate(backbone, ["hello"], [sick], max_new_tokens=2)


def test_logits_that_are_nan_choose_no_token() -> None:
    good, bad = torch.zeros((1, 5)), torch.full((1, 5), float("nan"))
    assert combine_logits(good).tolist() == [0.0] * 5
    for rows in (bad, torch.cat([good, bad])):
        with pytest.raises(BackboneError, match="not finite"):
            combine_logits(rows)
