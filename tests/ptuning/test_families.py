"""Every method on every family, against independent computations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from method_catalogue import select_served
from tiny_backbones import (
    CHUNKED,
    EAGER_ONLY,
    FAMILIES,
    SEQ2SEQ,
    SHARING,
    VOCAB,
    WINDOWED,
    as_groups,
    as_layers,
    batch_logits,
    build,
    build_model,
    call,
    logits_of,
    prefix_rows,
    random_ids,
    random_prefix,
    random_row,
    user_rows,
    with_window,
)
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig

from ptuning.data.encode import IGNORE, Encoded
from ptuning.errors import DataError
from ptuning.generation import _answer_steps, _causal_steps, generate
from ptuning.methods.base import Method, Parameters
from ptuning.methods.prefix import PrefixTuning
from ptuning.methods.prompt import PromptTuning
from ptuning.methods.ptuning import PTuning
from ptuning.model.attention import PLAN, implementation, mark_layer
from ptuning.model.attention_plan import (
    AttentionFacts,
    AttentionLayer,
    Reach,
    Tokens,
    plan_attention,
)
from ptuning.model.backbone import Backbone
from ptuning.model.batch import EMBEDDINGS, PackPrefix, RowPrefix
from ptuning.model.facts import CROSS, DECODER, ENCODER, Facts, StackFacts
from ptuning.model.groups import split_groups
from ptuning.prefix.artifact import Prefix, make_prefix, pack_prefix
from ptuning.prefix.ready import combine_logits, make_ready, rows_of
from ptuning.scoring import score_split
from ptuning.train.config import TrainConfig, Trained, UserRows
from ptuning.train.packed import train_pack
from ptuning.train.plain import train_user
from ptuning.train.start import members_of, too_long
from ptuning.train.step import LocalDriver, collate

P = 3
PAIRS = {**SEQ2SEQ, **EAGER_ONLY}  # encoder and decoder
ALL = {**FAMILIES, **PAIRS}
every_family = pytest.mark.parametrize("family", ALL)
pair_families = pytest.mark.parametrize("family", PAIRS)
windowed_families = pytest.mark.parametrize("family", WINDOWED)
kinds = pytest.mark.parametrize("kind", ["eager", "sdpa"])


def with_kinds(families: Sequence[str]) -> pytest.MarkDecorator:
    """Each family with each kind of attention that it has."""
    cases = [(family, "eager") for family in families]
    cases += [(family, "sdpa") for family in families if family not in EAGER_ONLY]
    return pytest.mark.parametrize(("family", "kind"), cases)


METHODS: dict[str, Method] = {
    "direct": PrefixTuning(num_virtual_tokens=P, init="random"),
    "mlp": PrefixTuning(num_virtual_tokens=P, encoder_hidden_size=8, init="random"),
    "prompt": PromptTuning(num_virtual_tokens=P, init="random"),
    "ptuning": PTuning(template="{p:1}{prompt} so{p:2}", encoder_hidden_size=8, init="random"),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=3e-5, rtol=1e-4)


# Gradients


def leaves_of(backbone: Backbone, method: Method, users: int) -> Parameters:
    """The parameters of U users, with a leading U, that require gradients."""
    own = [method.initial(backbone.facts, None, seed) for seed in range(users)]
    return Parameters(
        {
            name: torch.stack([one.trained[name] for one in own]).requires_grad_()
            for name in own[0].trained
        }
    )


def arrange_rows(backbone: Backbone, method: Method, rows: Sequence[Any]) -> list[Any]:
    """The rows as trainers pass them to the model."""
    user = UserRows(user_key="any", seed=0, train=tuple(rows), init_ids=(3, 4, 5))
    return list(members_of(method, backbone.template, user)[0].train)


def loss_gradients(
    backbone: Backbone, method: Method, slots: Sequence[int] = (0, 1, 0)
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of three rows' summed loss, of the tensors that enter the model and of the
    parameters."""
    parameters = leaves_of(backbone, method, 2)
    tensors = method.compile(parameters.trained, {}, backbone.facts)
    for values in tensors.values():
        values.retain_grad()
    rows = arrange_rows(
        backbone, method, [random_row(9, 6, 1), random_row(6, 3, 2), random_row(7, 4, 3)]
    )
    batch = collate(rows, backbone.device, backbone.facts.decoder_start_id)
    prefix = PackPrefix(tensors, backbone.facts, method.visibility).of_rows(
        torch.tensor(slots), backbone.dtype
    )
    backbone.token_nll(batch, prefix).sum().backward()
    entering = {name: values.grad for name, values in tensors.items() if values.grad is not None}
    learned = {name: p.grad for name, p in parameters.trained.items() if p.grad is not None}
    assert entering.keys() == tensors.keys()
    assert learned.keys() == parameters.trained.keys()
    return entering, learned


@with_kinds([*ALL])
@methods
def test_gradients_reach_every_layers_prefix_and_every_embedding_but_no_weight(
    family: str, kind: str, method: Method
) -> None:
    backbone = build(ALL[family](), kind)
    entering, learned = loss_gradients(backbone, method)
    assert set(entering) == set(method.shapes(backbone.facts))
    for name, grad in entering.items():
        # Norms of keys or values per user and layer, or of each user's embeddings.
        each = grad.flatten(2)
        assert bool((each.norm(dim=-1) > 1e-7).all()), name
    for name, grad in learned.items():
        assert bool((grad.flatten(1).norm(dim=-1) > 1e-7).all()), name
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())


@every_family
@methods
def test_a_slot_without_rows_takes_no_gradient(family: str, method: Method) -> None:
    entering, _ = loss_gradients(build(ALL[family]()), method, slots=(0, 0, 0))
    for grad in entering.values():
        assert bool(grad[0].abs().sum() > 0)
        assert not bool(grad[1].any())


@contextmanager
def layer_outputs(backbone: Backbone) -> Iterator[dict[tuple[str, int], list[Tensor]]]:
    """Record the output of each attention layer at every call, by (stack, layer)."""
    seen: dict[tuple[str, int], list[Tensor]] = {}
    handles = []
    for module in backbone.model.modules():
        place = getattr(module, "_ptuning_layer", None)
        if place is not None:

            def note(_module: nn.Module, _args: Any, output: Any, key: Any = place[:2]) -> None:
                seen.setdefault(key, []).append(output[0])

            handles.append(module.register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@every_family
@methods
def test_gradient_checkpointing_changes_no_gradient_and_recomputes_every_layer(
    family: str, method: Method
) -> None:
    plain = loss_gradients(build(ALL[family]()), method)
    backbone = build(ALL[family](), gradient_checkpointing=True)
    with layer_outputs(backbone) as seen:
        ours = loss_gradients(backbone, method)
    for got, expected in zip(ours, plain, strict=True):
        for name, grad in expected.items():
            torch.testing.assert_close(got[name], grad, atol=1e-6, rtol=1e-5)
    layers = sum(facts.layers for facts in backbone.facts.stacks.values())
    assert [len(calls) for calls in seen.values()] == [2] * layers


@every_family
def test_nothing_below_the_top_layers_is_back_propagated_through(family: str) -> None:
    backbone = build(ALL[family]())
    stacks = (DECODER,)
    method = PrefixTuning(num_virtual_tokens=P, init="random", layers=1, stacks=stacks)
    with layer_outputs(backbone) as seen:
        entering, _ = loss_gradients(backbone, method)
    assert as_layers(entering).shape[1] == 1
    top = backbone.facts.stacks[DECODER].layers - 1
    for (stack, layer), calls in seen.items():
        above = layer == top and stack in (DECODER, CROSS)
        assert all(output.requires_grad == above for output in calls), (stack, layer)


@pair_families
def test_each_stacks_top_layers_alone_are_back_propagated_through(family: str) -> None:
    backbone = build(PAIRS[family]())
    layers = {stack: facts.layers for stack, facts in backbone.facts.stacks.items()}
    for chosen, reached in {
        # Every decoder layer reads the encoder's states.
        ENCODER: {(ENCODER, layers[ENCODER] - 1), *((CROSS, n) for n in range(layers[CROSS])),
                  *((DECODER, n) for n in range(1, layers[DECODER]))},
        CROSS: {(CROSS, layers[CROSS] - 1)},  # self-attention comes before it
        DECODER: {(DECODER, layers[DECODER] - 1), (CROSS, layers[CROSS] - 1)},
    }.items():  # fmt: skip
        method = PrefixTuning(num_virtual_tokens=P, init="random", layers=1, stacks=(chosen,))
        with layer_outputs(backbone) as seen:
            loss_gradients(backbone, method)
        graph = {place for place, calls in seen.items() if calls[0].requires_grad}
        assert graph == reached, chosen


# Training


def make_teachable_users() -> list[UserRows]:
    """Two users, each with one answer to all questions, which a few rows teach."""
    pack = []
    for n, name in enumerate(("alice", "bob")):
        answer = random_ids(3, 90 + n)
        prompts = [random_ids(4 + k, 10 * n + k) for k in range(5)]
        rows = [Encoded(ids + answer, [IGNORE] * len(ids) + answer) for ids in prompts]
        pack.append(UserRows(user_key=name, seed=n, train=tuple(rows)))
    return pack


def train_packed(
    backbone: Backbone, method: Method, config: TrainConfig, pack: Sequence[UserRows]
) -> list[Trained]:
    return LocalDriver(backbone).run(train_pack(backbone, method, config, pack))


@pytest.mark.slow
@every_family
@methods
def test_training_lowers_the_loss_and_leaves_the_backbone_as_it_was(
    family: str, method: Method
) -> None:
    backbone = build(ALL[family]())
    before = backbone.checksum()
    through_encoder = getattr(method, "encoder_hidden_size", None) is not None
    config = TrainConfig(
        epochs=8,
        batch_size=4,
        learning_rate=2e-2 if through_encoder else 1e-1,
        patience=None,
        max_grad_norm=None,
    )
    for trained in train_packed(backbone, method, config, make_teachable_users()):
        assert trained.error is None
        losses = [line["train"] for line in trained.history if line["train"] is not None]
        assert len(losses) == 8
        assert losses[-1] < losses[0] - 0.03, losses
    backbone.verify_unchanged(before)


PAIR_METHODS: dict[str, Method] = {
    "all": PrefixTuning(num_virtual_tokens=P),
    "mlp": PrefixTuning(num_virtual_tokens=P, encoder_hidden_size=8),
    "mlp of keys": PrefixTuning(num_virtual_tokens=P, encoder_hidden_size=8, encoder_input="keys"),
    "encoder": PrefixTuning(num_virtual_tokens=P, stacks=("encoder",)),
    "decoder": PrefixTuning(num_virtual_tokens=P, stacks=("decoder",)),
    "cross": PrefixTuning(num_virtual_tokens=P, stacks=("cross",)),
    "no encoder": PrefixTuning(num_virtual_tokens=P, stacks=("decoder", "cross")),
    "no decoder": PrefixTuning(num_virtual_tokens=P, stacks=("encoder", "cross")),
    "no cross": PrefixTuning(num_virtual_tokens=P, stacks=("encoder", "decoder")),
    "top layer": PrefixTuning(num_virtual_tokens=P, layers=1),
    "embedding": PrefixTuning(num_virtual_tokens=P, layers="embedding"),
    "dropout": PrefixTuning(num_virtual_tokens=P, dropout=0.3),
    "prompt": PromptTuning(num_virtual_tokens=P),
    "ensemble": PromptTuning(num_virtual_tokens=P, ensemble=2, init="random"),
    "ptuning": PTuning(template="{p:1}{prompt} so{p:2}", encoder_hidden_size=8),
    "ptuning lstm": PTuning(template="{prompt}{p:3}", encoder="lstm", encoder_hidden_size=4),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, name) for family in ("t5", "bart") for name in PAIR_METHODS),
        *((family, name) for family in ("t5_gated", "t5gemma") for name in ("all", "ptuning")),
    ],
)
def test_a_pack_is_the_plain_trainer_on_encoder_decoder_models(family: str, name: str) -> None:
    backbone, method = build(PAIRS[family]()), PAIR_METHODS[name]
    config = TrainConfig(epochs=2, batch_size=3, learning_rate=1e-2, patience=None)
    pack = [user_rows("alice", 4, 2, P), user_rows("dave", 5, 0, P, longest=30)]
    for user, ours in zip(pack, train_packed(backbone, method, config, pack), strict=True):
        expected = train_user(backbone, method, config, user)
        assert ours.members is not None
        assert expected.members is not None
        for own, plain in zip(ours.members, expected.members, strict=True):
            assert own.keys() == plain.keys() == method.shapes(backbone.facts).keys()
            for name, values in plain.items():
                # Adam divides by the size of a gradient: a tiny gradient is mostly rounding.
                torch.testing.assert_close(own[name], values, atol=5e-4, rtol=0)
        assert (ours.steps, ours.tokens) == (expected.steps, expected.tokens)
        for line, wanted in zip(ours.history, expected.history, strict=True):
            assert line["train"] == pytest.approx(wanted["train"], abs=1e-4)
            assert line["valid"] == pytest.approx(wanted["valid"], abs=1e-4)


@with_kinds([*PAIRS])
def test_a_stack_left_out_gets_no_prefix(family: str, kind: str) -> None:
    """Each stack's prefix changes the loss, and every subset of stacks gives another loss."""
    backbone = build(PAIRS[family](), kind)
    whole = random_prefix(backbone, PrefixTuning(num_virtual_tokens=P), 1)
    batch = collate([random_row(9, 6, 1)], backbone.device, backbone.facts.decoder_start_id)

    def loss(stacks: Sequence[str]) -> float:
        layers = split_groups(
            {name: values[:, None] for name, values in whole.tensors.items()}, backbone.facts, 0
        )
        prefix = RowPrefix({stack: layers[stack] for stack in stacks})
        return float(backbone.token_nll(batch, prefix).sum())

    subsets = [(), (ENCODER,), (DECODER,), (CROSS,), (DECODER, CROSS), (ENCODER, CROSS),
               (ENCODER, DECODER), (ENCODER, DECODER, CROSS)]  # fmt: skip
    losses = [loss(stacks) for stacks in subsets]
    assert all(abs(one - two) > 1e-3 for n, one in enumerate(losses) for two in losses[n + 1 :]), (
        losses
    )


# Against the plain model: keys and values in its cache, embeddings at its input


def with_cache(model: Any, ids: Sequence[int], kv_LPHD: Tensor) -> Tensor:
    """Logits `[T, V]` of a plain model with the prefix `[L, 2, H, P, D]` in its cache."""
    cache = DynamicCache()
    for layer, kv in enumerate(kv_LPHD):
        cache.update(kv[0].unsqueeze(0), kv[1].unsqueeze(0), layer)
    mask = torch.ones((1, kv_LPHD.shape[-2] + len(ids)), dtype=torch.long)
    with torch.no_grad():
        output = model(input_ids=torch.tensor([list(ids)]), attention_mask=mask,
                       past_key_values=cache)  # fmt: skip
    return output.logits[0]


def embed_row(model: Any, ids: Sequence[int], virtual: Tensor) -> Tensor:
    """The embeddings `[1, T, E]` of a row, where id -1-k is `virtual[k]`."""
    reader = model.get_encoder() if model.config.is_encoder_decoder else model
    table = reader.get_input_embeddings()
    parts = [virtual[-1 - one] if one < 0 else table(torch.tensor(one)) for one in ids]
    return torch.stack(parts)[None]


@windowed_families
@kinds
@pytest.mark.parametrize("side", ["left", "right"])
def test_within_windows_a_prefix_is_what_past_key_values_are(
    family: str, kind: str, side: str
) -> None:
    """With `sliding_window: respect`: rows far longer than the window, and prefixes of different
    lengths, one longer than the window. `ignore` gives something else."""
    config = with_window(family, 5)
    backbone, plain = build(config, kind), build_model(with_window(family, 5), kind)
    settings = {"num_virtual_tokens": 7, "sliding_window": "respect"}
    windowed = [
        random_prefix(backbone, PrefixTuning(**settings), 1),
        random_prefix(backbone, PrefixTuning(**settings | {"num_virtual_tokens": 2}), 2),
    ]
    always = [
        make_prefix(
            one.members,
            replace(one.meta, method=PrefixTuning(num_virtual_tokens=one.num_virtual_tokens)),
        )
        for one in windowed
    ]
    rows = [random_ids(20, 1), random_ids(13, 2)]
    with torch.no_grad():
        ours = logits_of(backbone, rows, prefix_rows(backbone, windowed), side)
        mixed = logits_of(backbone, rows, prefix_rows(backbone, [windowed[0], always[1]]), side)
        seen = logits_of(backbone, rows, prefix_rows(backbone, always), side)
    for row, prefix in enumerate(windowed):
        expected = with_cache(plain, rows[row], as_layers(prefix.tensors))
        assert_close(ours[row], expected)
        # The first token's window contains some virtual tokens, the last one's none.
        assert (seen[row][-1] - expected[-1]).abs().max() > 1e-2
    assert_close(mixed[0], ours[0])
    assert_close(mixed[1], seen[1])


@windowed_families
@kinds
@pytest.mark.parametrize("side", ["left", "right"])
def test_beyond_windows_a_prefix_stays_visible_and_the_text_does_not(
    family: str, kind: str, side: str
) -> None:
    """With `sliding_window: ignore` and rows far longer than the window: equals the plain model
    with the prefix in its cache and masks made here."""
    window, length = 5, 20
    backbone = build(with_window(family, window), kind)
    plain = build_model(with_window(family, window), "eager")
    prefixes = [random_prefix(backbone, PrefixTuning(num_virtual_tokens=n), n) for n in (7, 2)]
    rows = [random_ids(length, 1), random_ids(length - 6, 2)]
    with torch.no_grad():
        ours = logits_of(backbone, rows, prefix_rows(backbone, prefixes), side)
    for row, prefix, got in zip(rows, prefixes, ours, strict=True):
        at = torch.arange(len(row))
        causal = at <= at[:, None]
        masks = {
            "full_attention": causal,
            "sliding_attention": causal & (at[:, None] - at < window),
        }
        whole = torch.ones((len(row), prefix.num_virtual_tokens), dtype=torch.bool)
        added = {
            name: torch.where(torch.cat([whole, own], 1), 0.0, torch.finfo(torch.float32).min)
            for name, own in masks.items()
        }
        mask = {name: own[None, None] for name, own in added.items()}
        by_layer = getattr(plain.config, "layer_types", None)
        cache = DynamicCache()
        for layer, kv in enumerate(as_layers(prefix.tensors)):
            cache.update(kv[0][None], kv[1][None], layer)
        with torch.no_grad():
            expected = plain(
                input_ids=torch.tensor([row]),
                attention_mask=mask if by_layer else mask["sliding_attention"],
                position_ids=at[None] + prefix.num_virtual_tokens,
                past_key_values=cache,
            ).logits[0]
        assert_close(got, expected)


@windowed_families
@kinds
def test_windows_are_kept_while_text_is_generated(family: str, kind: str) -> None:
    backbone, plain = build(with_window(family, 5), kind), build_model(with_window(family, 5), kind)
    methods = [PrefixTuning(num_virtual_tokens=n, sliding_window="respect") for n in (2, 6)]
    prefixes = [random_prefix(backbone, method, n) for n, method in enumerate(methods)]
    prompts, tokens = ["hello there", "the quick brown fox jumps over the lazy dog"], 9
    expected = []
    for prompt, prefix in zip(prompts, prefixes, strict=True):
        ids, kv = backbone.template.encode_prompt(prompt), as_layers(prefix.tensors)
        made: list[int] = []
        for _ in range(tokens):
            made.append(int(with_cache(plain, [*ids, *made], kv)[-1].argmax()))
        expected.append(backbone.template.decode(made))
        assert backbone.template.end_token_id not in made
    assert generate(backbone, prompts, prefixes, max_new_tokens=tokens) == expected


# Families as they are, and with windows that do not reach the leading virtual tokens.
PLACES: dict[str, Callable[[], PreTrainedConfig]] = {
    **FAMILIES,
    **{f"{name}, window": partial(with_window, name, 4) for name in WINDOWED},
}


@pytest.mark.parametrize("family", PLACES)
@kinds
@pytest.mark.parametrize("side", ["left", "right"])
def test_virtual_tokens_in_front_compile_to_keys_and_values(
    family: str, kind: str, side: str
) -> None:
    """Two users in a batch, with 6 and 2 virtual tokens: equals their embeddings in front."""
    backbone, plain = build(PLACES[family](), kind), build_model(PLACES[family](), kind)
    prompts = [PromptTuning(num_virtual_tokens=6), PromptTuning(num_virtual_tokens=2)]
    prefixes = [random_prefix(backbone, method, n) for n, method in enumerate(prompts)]
    rows = [random_ids(17, 1), random_ids(9, 2)]
    made = prefix_rows(backbone, prefixes)
    assert made is not None
    assert made.embeddings is None
    assert made.length == 6
    with torch.no_grad():
        ours = logits_of(backbone, rows, made, side)
        base = logits_of(backbone, rows, None, side)
        for row, prefix in enumerate(prefixes):
            virtual = prefix.tensors[EMBEDDINGS]
            ids = [*range(-1, -1 - len(virtual), -1), *rows[row]]
            expected = plain(inputs_embeds=embed_row(plain, ids, virtual)).logits[0]
            assert_close(ours[row], expected[len(virtual) :])
            assert (ours[row][0] - base[row][0]).abs().max() > 1e-2


@pytest.mark.parametrize("family", PLACES)
@kinds
@pytest.mark.parametrize("side", ["left", "right"])
def test_virtual_tokens_among_real_ones_are_embeddings_there(
    family: str, kind: str, side: str
) -> None:
    backbone, plain = build(PLACES[family](), kind), build_model(PLACES[family](), kind)
    templates = ["{p:1} hello{p:2}{prompt}{p:2}", "{prompt} so{p:1}"]
    prefixes = [
        random_prefix(backbone, PTuning(template=template), n)
        for n, template in enumerate(templates)
    ]
    ready = [make_ready(prefix, backbone) for prefix in prefixes]
    rows = [one.arrangement.prompt(random_ids(8 + 3 * n, n)) for n, one in enumerate(ready)]
    assert [sum(token < 0 for token in row) for row in rows] == [5, 1]
    with torch.no_grad():
        prefix = rows_of(backbone, [one.members[0] for one in ready])
        ours = logits_of(backbone, rows, prefix, side)
        for row, one in enumerate(prefixes):
            embeds = embed_row(plain, rows[row], one.tensors[EMBEDDINGS])
            assert_close(ours[row], plain(inputs_embeds=embeds).logits[0])


@with_kinds([*PAIRS])
@pytest.mark.parametrize(
    "method",
    [PromptTuning(num_virtual_tokens=4), PTuning(template="{p:2}{prompt} so{p:3}")],
    ids=["prompt", "ptuning"],
)
def test_an_encoders_virtual_tokens_stay_embeddings(family: str, kind: str, method: Method) -> None:
    """The encoder's virtual tokens see the real ones, so they cannot be precomputed."""
    backbone, plain = build(PAIRS[family](), kind), build_model(PAIRS[family](), kind)
    prefix = random_prefix(backbone, method, 1)
    ready = make_ready(prefix, backbone)
    assert not ready.members[0].layers
    virtual = prefix.tensors[EMBEDDINGS]
    source, answer = ready.arrangement.prompt(random_ids(8, 1)), [2, *random_ids(5, 2)]
    assert sum(token < 0 for token in source) == len(virtual)
    other = ready.arrangement.prompt(
        random_ids(14, 3)
    )  # a longer neighbour: padding must have no effect
    with torch.no_grad():
        ours = answer_logits(backbone, [source, other], [answer, answer], [prefix, prefix])
        expected = plain(
            inputs_embeds=embed_row(plain, source, virtual),
            attention_mask=torch.ones((1, len(source)), dtype=torch.long),
            decoder_input_ids=torch.tensor([answer]),
        ).logits[0]
    assert_close(ours[0], expected)


def answer_logits(
    backbone: Backbone,
    sources: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix | None],
) -> Tensor:
    """Logits `[R, S, V]` of answers of equal length; sources are padded on the right."""
    longest = max(len(row) for row in sources)
    ids, mask = (torch.zeros((len(sources), longest), dtype=torch.long) for _ in range(2))
    for r, row in enumerate(sources):
        ids[r, : len(row)], mask[r, : len(row)] = torch.tensor(row), 1
    prefix = prefix_rows(backbone, prefixes)
    return call(backbone, ids, mask, prefix, answers=torch.tensor(answers))


@with_kinds([*PAIRS])
def test_a_decoders_prefix_is_what_past_key_values_are(family: str, kind: str) -> None:
    """After a cache of P keys an answer begins at position P, whether positions are learned (BART),
    rotary (T5Gemma, within windows) or distances (T5). The batch has rows of different P, one
    whose prefix is not the decoder's and one without a prefix."""
    backbone, plain = build(PAIRS[family](), kind), build_model(PAIRS[family](), kind)
    settings: dict[str, Any] = {"stacks": ("decoder",), "sliding_window": "respect"}
    prefixes = [
        random_prefix(backbone, PrefixTuning(num_virtual_tokens=n, **settings), n) for n in (5, 2)
    ]
    of_encoder = random_prefix(backbone, PrefixTuning(num_virtual_tokens=4, stacks=("encoder",)), 1)
    sources = [random_ids(n, n) for n in (8, 5, 7, 6)]
    answers = [random_ids(6, 10 + n) for n in range(4)]
    with torch.no_grad():
        ours = answer_logits(backbone, sources, answers, [*prefixes, of_encoder, None])
        base = answer_logits(backbone, sources, answers, [None] * 4)
        alone = answer_logits(backbone, sources[2:3], answers[2:3], [of_encoder])
        assert_close(ours[2], alone[0])
        assert_close(ours[3], base[3])
        for row, prefix in enumerate(prefixes):
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            for layer, kv in enumerate(as_layers(prefix.tensors)):
                cache.self_attention_cache.update(kv[0][None], kv[1][None], layer)
            expected = plain(
                input_ids=torch.tensor([sources[row]]),
                attention_mask=torch.ones((1, len(sources[row])), dtype=torch.long),
                decoder_input_ids=torch.tensor([answers[row]]),
                past_key_values=cache,
            ).logits[0]
            assert_close(ours[row], expected)
            assert (ours[row] - base[row]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["t5", "t5_gated"])
@kinds
def test_left_padding_changes_nothing_with_relative_positions(family: str, kind: str) -> None:
    backbone = build(PAIRS[family](), kind)
    prefix = prefix_rows(backbone, [random_prefix(backbone, PrefixTuning(num_virtual_tokens=P), 1)])
    source, answer = random_ids(7, 1), torch.tensor([random_ids(5, 2)])
    results = []
    for padded, mask in (
        (source, [1] * 7),
        ([*source, 0, 0, 0], [1] * 7 + [0] * 3),
        ([0, 0, 0, *source], [0] * 3 + [1] * 7),
    ):
        ids = torch.tensor([padded])
        results.append(call(backbone, ids, torch.tensor([mask]), prefix, answers=answer))
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


def test_padding_after_a_long_prefix_stays_within_the_positions() -> None:
    """BART has 128 positions. Padding a short answer after 120 virtual tokens would reach 240."""
    backbone = build(PAIRS["bart"]())
    long = random_prefix(backbone, PrefixTuning(num_virtual_tokens=120, stacks=("decoder",)), 1)
    sources, answers = [random_ids(6, 1), random_ids(6, 2)], [random_ids(5, 3), random_ids(120, 4)]
    padded = [[*answers[0], *[0] * 115], answers[1]]
    with torch.no_grad():
        both = answer_logits(backbone, sources, padded, [long, None])
        assert_close(both[0, :5], answer_logits(backbone, sources[:1], answers[:1], [long])[0])
        assert_close(both[1], answer_logits(backbone, sources[1:], answers[1:], [None])[0])
    assert generate(backbone, ["hi"], [long], max_new_tokens=8)
    with pytest.raises(DataError, match="too few positions"):
        generate(backbone, ["hi"], [long], max_new_tokens=9)
    of_encoder = random_prefix(backbone, PrefixTuning(num_virtual_tokens=120, stacks=("cross",)), 1)
    assert generate(backbone, ["hi"], [of_encoder], max_new_tokens=9)
    method = PrefixTuning(num_virtual_tokens=120, init="random")
    rows = UserRows(user_key="any", seed=0, train=(random_row(15, 9, 1),))
    assert "take 129 positions" in (too_long(rows, backbone.facts, method) or "")
    assert too_long(replace(rows, train=(random_row(14, 8, 1),)), backbone.facts, method) is None


@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize("combine", ["mean", "vote"])
def test_an_ensembles_loss_is_that_of_the_mean_with_which_it_answers(
    family: str, combine: Any
) -> None:
    """The members' logits are combined as for an answer, whatever the microbatches. A vote has no
    likelihood and is judged in the same way. Two users of one method, rows of several lengths."""
    backbone = build(ALL[family]())
    method = PromptTuning(num_virtual_tokens=P, ensemble=3, combine=combine)
    prefixes = [random_prefix(backbone, method, seed) for seed in (1, 2)]
    arrangement = prefixes[0].arrangement(backbone.template)
    users = [
        [arrangement.judged_row(random_row(length, 3, length)) for length in lengths]
        for lengths in ((6, 11, 8), (9, 7))
    ]
    expected = []
    for prefix, rows in zip(prefixes, users, strict=True):
        ready = make_ready(prefix, backbone)
        for row in rows:
            batch = collate([row], backbone.device, backbone.facts.decoder_start_id)
            members = []
            for member in range(3):
                method_of_one = method.model_copy(update={"ensemble": 1})
                only = make_prefix(
                    prefix.members[member : member + 1], replace(prefix.meta, method=method_of_one)
                )
                rows_prefix = pack_prefix([only], backbone).of_rows(
                    torch.tensor([0]), backbone.dtype
                )
                with torch.no_grad():
                    members.append(batch_logits(backbone, batch, rows_prefix))
            assert ready.combine == combine
            at_each = torch.stack(members, dim=1)  # [N, members, V]
            log_p = torch.stack([combine_logits(one) for one in at_each]).log_softmax(-1)
            expected.append(float(-log_p[range(3), batch.targets].sum()))
    for budget in (1, 40, 4096):
        machine = score_split(backbone, users, pack_prefix(prefixes, backbone), budget, 3)
        losses = LocalDriver(backbone).run(machine)
        assert [nats for one in losses for nats in one.nats] == pytest.approx(expected, rel=1e-4)
        assert [one.tokens for one in losses] == [(3, 3, 3), (3, 3)]


# Generation

CAUSAL_USERS: dict[str, Method | None] = {"base": None, **select_served()}
PAIR_USERS: dict[str, Method | None] = {"base": None, **select_served(pairs=True)}
# All that a batch may contain, including windows shorter than the texts.
SERVED: dict[str, Callable[[], PreTrainedConfig]] = {
    **PLACES,
    **SHARING,
    **CHUNKED,
    **PAIRS,
}


def prefixes_of_every_kind(backbone: Backbone) -> list[Prefix | None]:
    """A prefix of each kind that the backbone supports, and None."""
    chosen = CAUSAL_USERS if backbone.facts.decoder_start_id is None else PAIR_USERS
    return [
        None if method is None else random_prefix(backbone, method, n)
        for n, method in enumerate(chosen.values())
    ]


@pytest.mark.parametrize("family", [*FAMILIES, *CHUNKED])
def test_a_checkpointed_backbone_generates_what_a_plain_one_does(family: str) -> None:
    """Checkpointed layers would silently drop the cache, so that a step ignores earlier tokens."""
    config = (FAMILIES | CHUNKED)[family]
    plain, checkpointed = build(config()), build(config(), gradient_checkpointing=True)
    prefixes = prefixes_of_every_kind(plain)
    prompts = [prompt_of(n) for n in range(len(prefixes))]
    expected = generate(plain, prompts, prefixes, max_new_tokens=6)
    with torch.enable_grad():
        assert (
            generate(checkpointed, prompts, prefixes_of_every_kind(checkpointed), max_new_tokens=6)
            == expected
        )


def prompt_of(n: int) -> str:
    return f"what is number {n}? " * (1 + n % 3)


@pytest.mark.parametrize("family", SERVED)
def test_all_methods_in_one_batch_answer_as_each_alone(family: str) -> None:
    backbone = build(SERVED[family]())
    prefixes = prefixes_of_every_kind(backbone)
    prompts = [prompt_of(n) for n in range(len(prefixes))]
    together = generate(backbone, prompts, prefixes, max_new_tokens=6)
    alone = [
        generate(backbone, [prompt], [prefix], max_new_tokens=6)[0]
        for prompt, prefix in zip(prompts, prefixes, strict=True)
    ]
    assert together == alone
    assert len(set(together)) > 2, "the prefixes change answers"


@pytest.mark.slow
@with_kinds([*SERVED])
def test_all_methods_in_one_batch_have_each_ones_logits(family: str, kind: str) -> None:
    """Differences that texts can hide: logits of three steps, for each member of an ensemble."""
    backbone = build(SERVED[family](), kind)
    ready = [
        None if one is None else make_ready(one, backbone)
        for one in prefixes_of_every_kind(backbone)
    ]
    rows, members = [], []
    for n, one in enumerate(ready):
        ids = backbone.template.encode_prompt(prompt_of(n))
        for member in [None] if one is None else one.members:
            rows.append(ids if one is None else one.arrangement.prompt(ids))
            members.append(member)
    steps = _causal_steps if backbone.facts.decoder_start_id is None else _answer_steps
    forced = [random_ids(len(rows), n) for n in range(2)]

    def logits(chosen: slice) -> Tensor:
        run = steps(backbone, rows[chosen], rows_of(backbone, members[chosen]))
        return torch.stack([next(run), *(run.send(tokens[chosen]) for tokens in forced)], dim=1)

    together = logits(slice(None))
    for n in range(len(rows)):
        assert_close(together[n], logits(slice(n, n + 1))[0])


@pytest.mark.slow
@with_kinds([*SERVED])
def test_generation_computes_the_logits_of_training(family: str, kind: str) -> None:
    """The logits of an answer's three tokens, computed step by step, equal those of one pass over
    the training row."""
    backbone = build(SERVED[family](), kind)
    start = backbone.facts.decoder_start_id
    steps = _causal_steps if start is None else _answer_steps
    for n, prefix in enumerate(prefixes_of_every_kind(backbone)):
        if prefix is None:
            continue
        prompt, answer = backbone.template.encode_prompt(prompt_of(n)), random_ids(3, n)
        row = Encoded([*prompt, *answer], [IGNORE] * len(prompt) + answer)
        arranged = prefix.arrangement(backbone.template).row(row)
        batch = collate([arranged], backbone.device, start)
        trained = pack_prefix([prefix], backbone)
        ready = make_ready(prefix, backbone)
        for member in range(len(prefix.members)):
            with torch.no_grad():
                prefix_row = trained.of_rows(torch.tensor([member]), torch.float32)
                whole = batch_logits(backbone, batch, prefix_row)
            run = steps(
                backbone,
                [ready.arrangement.prompt(prompt)],
                rows_of(backbone, [ready.members[member]]),
            )
            stepped = [next(run), *(run.send([token]) for token in answer[:-1])]
            assert_close(torch.cat(stepped), whole)


# A bidirectional encoder without a language model around it


def bert(kind: str) -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertModel._from_config(config, attn_implementation=kind)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values * 0.7 / parameter.shape[-1] ** 0.5)
    return model.eval().requires_grad_(False)


def bert_by_hand(ids: Tensor, kv_LPHD: Tensor) -> Tensor:
    """Hidden states `[1, T, E]` of one row, without our code: softmax(q [Pk; k]^T / sqrt(D))
    [Pv; v] in every layer (Li and Liang 2021)."""
    model = bert("eager")
    for layer, block in enumerate(model.encoder.layer):
        own = block.attention.self

        def attend(hidden: Tensor, *_: Any, own: Any = own, kv: Tensor = kv_LPHD[layer],
                   **__: Any) -> tuple[Tensor, None]:  # fmt: skip
            def heads(x: Tensor) -> Tensor:  # [H, T, D]
                return x[0].unflatten(-1, (4, 8)).transpose(0, 1)

            query = heads(own.query(hidden))
            key = torch.cat([kv[0], heads(own.key(hidden))], dim=1)
            value = torch.cat([kv[1], heads(own.value(hidden))], dim=1)
            weights = torch.softmax(query @ key.transpose(1, 2) / 8**0.5, dim=-1)
            return (weights @ value).transpose(0, 1).flatten(1)[None], None

        own.forward = attend
    return model(input_ids=ids).last_hidden_state


@kinds
@pytest.mark.parametrize("padding", [0, 3])
def test_on_bert_the_attention_is_the_formulas_with_its_gradients(kind: str, padding: int) -> None:
    model = bert(implementation(kind))
    layers = tuple(AttentionLayer(ENCODER, n, 2, Reach()) for n in range(2))
    for layer, block in zip(layers, model.encoder.layer, strict=True):
        mark_layer(block.attention.self, layer)
    kv = torch.randn((2, 2, 2, 4, 5, 8), generator=torch.Generator().manual_seed(1))
    ours, by_hand = kv.clone().requires_grad_(), kv.clone().requires_grad_()
    rows = torch.tensor([random_ids(7, 1), random_ids(7, 2)])
    ids = torch.cat([rows, torch.zeros((2, padding), dtype=torch.long)], dim=1)
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0
    facts = Facts(
        stacks={ENCODER: StackFacts.of_one_shape(layers=2, heads=4, head_dim=8)},
        hidden_size=32,
        vocab_size=1,
        max_positions=None,
    )
    pack = PackPrefix(as_groups(ours, ENCODER), facts)
    prefix = pack.of_rows(torch.tensor([0, 1]), torch.float32)
    dtype = torch.float32 if kind == "eager" else torch.bool
    tokens = {ENCODER: Tokens.of_columns(ids.shape[1], mask)}
    plan = plan_attention(tokens, prefix, AttentionFacts({ENCODER: layers}, dtype))
    hidden = model(input_ids=ids, attention_mask=mask, **{PLAN: plan}).last_hidden_state[:, :7]
    expected = torch.cat([bert_by_hand(rows[r : r + 1], by_hand[r]) for r in range(2)])
    assert_close(hidden, expected)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (hidden * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad is not None
    assert by_hand.grad is not None
    torch.testing.assert_close(ours.grad, by_hand.grad, atol=1e-4, rtol=1e-4)
    assert bool((by_hand.grad.flatten(3).norm(dim=-1) > 1e-3).all()), "every layer is reached"
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        plain = bert("eager")(input_ids=rows).last_hidden_state
    assert (hidden - plain).abs().max() > 1e-2
