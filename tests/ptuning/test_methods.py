"""Methods: their encoders, layouts and settings, and what they refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors
from tiny_backbones import (
    EAGER_ONLY,
    FAMILIES,
    SEQ2SEQ,
    build,
    build_model,
    random_prefix,
    random_row,
    user_rows,
)
from tiny_model import make_tokenizer
from torch import Tensor, nn

from ptuning.data.encode import IGNORE, Encoded, Template
from ptuning.data.examples import arrange
from ptuning.data.layout import Arrangement, Layout, between, front
from ptuning.errors import (
    ArtifactError,
    CorruptArtifact,
    DataError,
    MethodError,
    PTuningError,
    WrongBackbone,
    WrongMethod,
    WrongShape,
)
from ptuning.identity import Recipe
from ptuning.methods import catalogue
from ptuning.methods.base import KeysAndValuesTuning, Method, Parameters
from ptuning.methods.catalogue import METHODS
from ptuning.methods.encoders import initial_linear, initial_lstm, linear, lstm
from ptuning.methods.prefix import PrefixTuning
from ptuning.methods.prompt import PromptTuning
from ptuning.methods.ptuning import PTuning
from ptuning.model.attention import implementation
from ptuning.model.backbone import Backbone
from ptuning.model.batch import EMBEDDINGS, Visibility
from ptuning.model.facts import CROSS, DECODER, ENCODER, Facts, stack_of
from ptuning.model.load import outline
from ptuning.pack import encode_user
from ptuning.prefix.artifact import Prefix, PrefixMeta, make_prefix
from ptuning.prefix.ready import make_ready
from ptuning.scoring import nll
from ptuning.train.config import TrainConfig
from ptuning.train.packed import train_pack
from ptuning.train.plain import train_user
from ptuning.train.step import LocalDriver
from ptuning.tuning import tune
from ptuning.types import Example

TEMPLATE = Template.of(make_tokenizer())


@pytest.fixture(scope="module")
def causal() -> Backbone:
    return build(FAMILIES["llama"]())


@pytest.fixture(scope="module")
def pair() -> Backbone:
    """BART: an encoder of three layers, a decoder of two."""
    return build(SEQ2SEQ["bart"]())


def assert_explained(error: PTuningError, *words: str) -> None:
    """Check that the error says what was seen, what was expected and what to change, and contains
    these words."""
    assert error.seen is not None
    assert error.expected is not None
    assert error.fix is not None
    for word in words:
        assert word in str(error), (word, str(error))


# Encoders of U users at once equal torch's modules

U, COUNT, WIDTH, HIDDEN = 3, 5, 6, 4


def stack_weights(of_one: Callable[[torch.Generator], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of U users, each from a separate seed, with a leading U."""
    users = [of_one(torch.Generator().manual_seed(seed)) for seed in range(U)]
    return {name: torch.stack([user[name] for user in users]) for name in users[0]}


def inputs() -> Tensor:
    return torch.randn((U, COUNT, WIDTH), generator=torch.Generator().manual_seed(9))


def assert_same_as_torch(
    ours: Callable[[dict[str, Tensor], Tensor], Tensor],
    weights: dict[str, Tensor],
    modules: Sequence[nn.Module],
    places: dict[str, str],
) -> None:
    """Check that values, and gradients of all weights and inputs, equal those of each user's
    module. `places` maps our weights to torch's names; our matrices are transposed."""
    with torch.no_grad():
        for user, module in enumerate(modules):
            own = dict(module.named_parameters())
            assert set(own) == set(places.values())
            for name, place in places.items():
                own[place].copy_(weights[name][user].mT if own[place].ndim > 1 else
                                 weights[name][user])  # fmt: skip
    leaves = {name: values.clone().requires_grad_() for name, values in weights.items()}
    x, theirs = inputs().requires_grad_(), inputs().requires_grad_()
    result = ours(leaves, x)
    outputs = [module(theirs[user : user + 1]) for user, module in enumerate(modules)]
    expected = torch.cat([out[0] if isinstance(out, tuple) else out for out in outputs])
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
    pull = torch.randn(result.shape, generator=torch.Generator().manual_seed(8))
    (result * pull).sum().backward()
    (expected * pull).sum().backward()
    torch.testing.assert_close(x.grad, theirs.grad, atol=1e-5, rtol=1e-5)
    for user, module in enumerate(modules):
        own = dict(module.named_parameters())
        for name, place in places.items():
            grad, wanted = leaves[name].grad, own[place].grad
            assert grad is not None
            assert wanted is not None
            assert bool(wanted.any())
            wanted = wanted.mT if wanted.ndim > 1 else wanted
            torch.testing.assert_close(grad[user], wanted, atol=1e-5, rtol=1e-5)


def test_a_linear_layer_of_many_users_is_torchs() -> None:
    weights = stack_weights(lambda generator: initial_linear("7", WIDTH, HIDDEN, generator))
    modules = [nn.Linear(WIDTH, HIDDEN) for _ in range(U)]
    places = {"w7": "weight", "b7": "bias"}
    assert_same_as_torch(lambda p, x: linear(p, "7", x), weights, modules, places)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_an_lstm_of_many_users_is_torchs(layers: int) -> None:
    weights = stack_weights(lambda generator: initial_lstm(WIDTH, HIDDEN, layers, generator))
    modules = [
        nn.LSTM(WIDTH, HIDDEN, layers, bidirectional=True, batch_first=True) for _ in range(U)
    ]
    places = {
        f"lstm{layer}.{direction}.{ours}": f"{theirs}_l{layer}{suffix}"
        for layer in range(layers)
        for direction, suffix in (("forward", ""), ("backward", "_reverse"))
        for ours, theirs in (
            ("w_ih", "weight_ih"),
            ("w_hh", "weight_hh"),
            ("b_ih", "bias_ih"),
            ("b_hh", "bias_hh"),
        )
    }
    assert set(weights) == set(places)
    assert_same_as_torch(lambda p, x: lstm(p, layers, x), weights, modules, places)


def test_encoders_begin_as_torchs_modules_do() -> None:
    """Uniform, with torch's bounds: 1/sqrt(fan in) for Linear, 1/sqrt(hidden) for LSTM."""
    generator = torch.Generator().manual_seed(1)
    drawn = initial_linear("1", 400, 300, generator)
    weights: list[tuple[Tensor, Any]] = [
        (drawn["w1"], nn.Linear(400, 300).weight),
        (initial_lstm(30, 100, 1, generator)["lstm0.forward.w_ih"], nn.LSTM(30, 100).weight_ih_l0),
    ]
    for values, weight in weights:
        assert float(values.abs().max()) == pytest.approx(
            float(weight.detach().abs().max()), rel=1e-2
        )
        assert float(values.std()) == pytest.approx(float(weight.detach().std()), rel=2e-2)
    assert float(drawn["b1"].abs().max()) <= 1 / math.sqrt(400)


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_an_encoder_added_to_words_begins_at_the_words(causal: Backbone, encoder: Any) -> None:
    method = PTuning(template="{p:2}{prompt}{p:1}", encoder=encoder, encoder_hidden_size=HIDDEN)
    words = torch.randn((3, causal.facts.hidden_size), generator=torch.Generator().manual_seed(1))
    own = method.initial(causal.facts, {EMBEDDINGS: words}, 0)
    trained = {name: values[None] for name, values in own.trained.items()}
    fixed = {name: values[None] for name, values in own.fixed.items()}
    assert torch.equal(method.compile(trained, fixed, causal.facts)[EMBEDDINGS][0], words)


# Positions of virtual tokens

texts = st.sampled_from(["hello", " so ", "well, ", "\n\n", "Ünïcode ", "a b c", "0"])
side = st.lists(st.integers(1, 4) | texts, max_size=4)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, list[int | str], list[int | str]]:
    """A parsed template with at least one virtual token, and its parts before and after the
    prompt."""
    before, after = draw(side), draw(side)
    if not any(isinstance(part, int) for part in before + after):
        after.append(draw(st.integers(1, 4)))

    def text(parts: list[int | str]) -> str:
        return "".join(f"{{p:{part}}}" if isinstance(part, int) else part for part in parts)

    end = draw(st.sampled_from(["", "{completion}"]))
    return Layout.parse(f"{text(before)}{{prompt}}{text(after)}{end}"), before, after


arrangements = layouts().map(lambda drawn: drawn[0].bind(TEMPLATE))
rows = st.builds(
    lambda prompt, answer: Encoded(prompt + answer, [IGNORE] * len(prompt) + answer),
    st.lists(st.integers(0, 299), max_size=6),
    st.lists(st.integers(0, 299), max_size=4),
)


@given(layouts())
def test_a_template_is_read_as_it_is_written(
    drawn: tuple[Layout, list[int | str], list[int | str]],
) -> None:
    layout, before, after = drawn
    counts = [part for part in before + after if isinstance(part, int)]
    assert layout.num_virtual_tokens == sum(counts)
    bound = layout.bind(TEMPLATE)
    virtual = [token for token in (*bound.before, *bound.after) if token < 0]
    assert virtual == list(range(-1, -1 - sum(counts), -1)), "numbered in reading order"
    for ids, parts in ((bound.before, before), (bound.after, after)):
        # Adjacent pieces of text are one text.
        text = "".join("\0" if isinstance(part, int) else part for part in parts)
        words = [token for piece in text.split("\0") for token in TEMPLATE.ids(piece)]
        assert [token for token in ids if token >= 0] == words
    assert bound.anchors == len(bound.before) + len(bound.after) - sum(counts)


@given(arrangements, rows)
def test_a_row_keeps_its_tokens_order_and_labels(arrangement: Arrangement, row: Encoded) -> None:
    arranged = arrangement.row(row)
    at, added = row.prompt_length, len(arrangement.before) + len(arrangement.after)
    assert len(arranged.input_ids) == len(arranged.labels) == len(row.input_ids) + added
    assert arranged.input_ids == [
        *arrangement.before,
        *row.input_ids[:at],
        *arrangement.after,
        *row.input_ids[at:],
    ]
    assert arranged.prompt_length == at + added or not row.supervised
    assert [label for label in arranged.labels if label != IGNORE] == [
        label for label in row.labels if label != IGNORE
    ]
    for token, label in zip(arranged.input_ids, arranged.labels, strict=True):
        assert label in (IGNORE, token)
    assert arranged.labels[: at + added] == [IGNORE] * (at + added)
    assert arrangement.prompt(row.input_ids[:at]) == arranged.input_ids[: at + added]


@given(arrangements)
def test_virtual_tokens_are_in_front_where_no_real_one_comes_before_any(
    arrangement: Arrangement,
) -> None:
    prompt = 7
    ids = arrangement.prompt([prompt])
    virtual = [at for at, token in enumerate(ids) if token < 0]
    real = [at for at, token in enumerate(ids) if token >= 0]
    before_all = max(virtual) < min(real)
    assert arrangement.in_front == (len(virtual) if before_all else 0)
    left = arrangement.without_front().prompt([prompt])
    assert left == ([token for token in ids if token >= 0] if before_all else ids)


def test_the_plain_layouts() -> None:
    assert front(3).bind(TEMPLATE) == Arrangement((-1, -2, -3), ())
    assert between(2).bind(TEMPLATE) == Arrangement((), (-1, -2))
    assert front(3).bind(TEMPLATE).in_front == 3
    assert between(2).bind(TEMPLATE).in_front == 0
    assert Arrangement().in_front == 0


@pytest.mark.parametrize(
    ("template", "seen"),
    [
        ("{p:3}{completion}", "{prompt} 0 times"),
        ("", "{prompt} 0 times"),
        ("{p:3}{prompt}{prompt}", "{prompt} 2 times"),
        ("{p:3}{prompt}{completion} bye", "after {completion}"),
        ("{p:3}{prompt}{completion}{p:1}", "after {completion}"),
        ("{p:3}{completion}{prompt}", "after {completion}"),
        ("{p:3}{prompt}{completion}{completion}", "twice"),
        ("{p:3}{prompt}{answer}", "{answer}"),
        ("{p:3}{ prompt }", "{ prompt }"),
        ("{p:0}{prompt}", "{p:0}"),
        ("{p:-1}{prompt}", "{p:-1}"),
        ("{p}{prompt}", "{p}"),
        ("{}{p:1}{prompt}", "{}"),
        ("{p:3}{prompt} {", "a brace alone"),
        ("}{p:3}{prompt}", "a brace alone"),
        ("{p:3}{{prompt}}", "a brace alone"),
        ("{prompt} nothing to train {completion}", "no virtual tokens"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_when_it_is_set(template: str, seen: str) -> None:
    with pytest.raises(MethodError) as caught:
        PTuning(template=template)
    assert_explained(caught.value, seen, "{p:N}", "method.template")


@pytest.mark.parametrize(
    "template", ["{p:1001}{prompt}", "{p:600}{prompt}{p:401}", "{p:99999}{prompt}"]
)
def test_a_template_with_too_many_virtual_tokens_is_refused(template: str) -> None:
    with pytest.raises(MethodError, match="too many") as caught:
        PTuning(template=template)
    assert_explained(caught.value, template, "at most 1000", "method.template")
    PTuning(template="{p:600}{prompt}{p:400}")


# Settings that are refused


@pytest.mark.parametrize(
    ("method", "settings", "field"),
    [
        (PrefixTuning, {"num_virtual_tokens": 0}, "num_virtual_tokens"),
        (PrefixTuning, {"num_virtual_tokens": 1001}, "num_virtual_tokens"),
        (PrefixTuning, {"num_virtual_tokens": -1}, "num_virtual_tokens"),
        (PrefixTuning, {"num_virtual_tokens": 2.5}, "num_virtual_tokens"),
        (PrefixTuning, {"encoder_hidden_size": 0}, "encoder_hidden_size"),
        (PrefixTuning, {"layers": 0}, "layers"),
        (PrefixTuning, {"layers": "top"}, "layers"),
        (PrefixTuning, {"layers": True}, "layers"),
        (PrefixTuning, {"stacks": ()}, "stacks"),
        (PrefixTuning, {"stacks": ("middle",)}, "stacks"),
        (PrefixTuning, {"placement": "suffix"}, "placement"),
        (PrefixTuning, {"sliding_window": "never"}, "sliding_window"),
        (PrefixTuning, {"dropout": 1.0}, "dropout"),
        (PrefixTuning, {"num_virtual_token": 3}, "num_virtual_token"),
        (PromptTuning, {"num_virtual_tokens": 0}, "num_virtual_tokens"),
        (PromptTuning, {"num_virtual_tokens": 1001}, "num_virtual_tokens"),
        (PromptTuning, {"ensemble": 0}, "ensemble"),
        (PromptTuning, {"ensemble": 17}, "ensemble"),
        (PromptTuning, {"combine": "best"}, "combine"),
        (PromptTuning, {"init": "words"}, "init"),
        (PTuning, {"encoder": "gru"}, "encoder"),
        (PTuning, {"encoder_hidden_size": 0}, "encoder_hidden_size"),
        (PTuning, {"encoder_num_layers": 9}, "encoder_num_layers"),
        (PTuning, {"num_virtual_tokens": 3}, "num_virtual_tokens"),  # the template determines it
    ],
)
def test_settings_out_of_range_say_what_was_seen_and_what_to_change(
    method: Callable[..., Method], settings: dict[str, Any], field: str
) -> None:
    with pytest.raises(MethodError) as caught:
        method(**settings)
    assert_explained(caught.value, f"method.{field}")
    (value,) = settings.values()
    if field in getattr(method, "model_fields", {}):
        assert f"method.{field}={value!r}" in str(caught.value.seen) or field == "stacks"


def test_settings_that_are_no_mapping_are_refused() -> None:
    for settings in (5, [1], None):
        with pytest.raises(MethodError) as caught:
            PrefixTuning.model_validate(settings)
        assert_explained(caught.value)


# Methods that a backbone refuses


def refusal(backbone: Backbone, method: Method) -> MethodError:
    """The error that both trainers and `tune` raise before training; it is the same."""
    config, user = TrainConfig(epochs=1), user_rows("alice", 2, 0, init_ids=200)
    examples = [Example(prompt=f"say {n}", completion="so") for n in range(12)]
    calls: list[Callable[[], Any]] = [
        lambda: method.check(backbone.facts),
        lambda: train_user(backbone, method, config, user),
        lambda: LocalDriver(backbone).run(train_pack(backbone, method, config, [user])),
        lambda: tune(backbone, {"alice": examples}, method=method, train=config),
    ]
    errors = []
    for call in calls:
        with pytest.raises(MethodError) as caught:
            call()
        errors.append(caught.value)
    assert len({str(error) for error in errors}) == 1
    return errors[0]


LIMIT = 128  # positions of the tiny backbones


@pytest.mark.parametrize(
    "method",
    [
        PrefixTuning(num_virtual_tokens=LIMIT),
        PrefixTuning(num_virtual_tokens=LIMIT, layers="embedding"),
        PromptTuning(num_virtual_tokens=LIMIT),
        PTuning(template=f"{{p:{LIMIT - 1}}}{{prompt}}{{p:1}}"),
    ],
    ids=["prefix", "embedding", "prompt", "ptuning"],
)
def test_more_virtual_tokens_than_positions_are_refused(causal: Backbone, method: Method) -> None:
    error = refusal(causal, method)
    assert_explained(error, str(LIMIT), f"fewer than {LIMIT}", "num_virtual_tokens")


def test_a_row_too_long_beside_the_virtual_tokens_fails_its_user_alone(
    causal: Backbone,
) -> None:
    long = replace(user_rows("long", 1, 0, 3), train=(random_row(LIMIT - 2, 3, 1),))
    for method in (PrefixTuning(num_virtual_tokens=3), PromptTuning(num_virtual_tokens=3)):
        pack = [user_rows("alice", 2, 0, 3), long]
        machine = train_pack(causal, method, TrainConfig(epochs=1), pack)
        good, bad = LocalDriver(causal).run(machine)
        assert good.error is None
        assert bad.members is None
        assert bad.error is not None
        assert "num_virtual_tokens" in bad.error
        assert train_user(causal, method, TrainConfig(epochs=1), long).error == bad.error
        short = replace(long, train=(random_row(LIMIT - 3, 3, 1),))
        assert train_user(causal, method, TrainConfig(epochs=1), short).error is None


def test_layers_beyond_the_backbone_are_refused(causal: Backbone, pair: Backbone) -> None:
    assert_explained(refusal(causal, PrefixTuning(layers=3)), "method.layers=3", "1 to 2")
    # The decoder has two layers, so three fit an encoder's prefix alone.
    assert_explained(refusal(pair, PrefixTuning(layers=3)), "method.layers=3", "1 to 2")
    PrefixTuning(layers=3, stacks=("encoder",)).check(pair.facts)
    assert_explained(refusal(pair, PrefixTuning(layers=4, stacks=("encoder",))), "=4", "1 to 3")


@pytest.mark.parametrize("stack", [ENCODER, CROSS])
def test_a_stack_that_a_causal_model_lacks_is_refused(causal: Backbone, stack: Any) -> None:
    error = refusal(causal, PrefixTuning(stacks=(DECODER, stack)))
    assert_explained(error, f"method.stacks: {stack}", DECODER)


@pytest.mark.parametrize("layers", ["all", "embedding", 1])
def test_an_infix_on_an_encoder_decoder_model_is_refused(pair: Backbone, layers: Any) -> None:
    error = refusal(pair, PrefixTuning(placement="infix", layers=layers))
    assert_explained(error, "method.placement=infix", "expected: prefix")


class WithoutEmbeddings(transformers.LlamaForCausalLM):
    """A model whose forward takes ids only, no embeddings."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if "inputs_embeds" in kwargs:
            raise TypeError("inputs_embeds")
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )


@pytest.fixture(scope="module")
def refusing() -> Backbone:
    model = WithoutEmbeddings._from_config(
        FAMILIES["llama"](), attn_implementation=implementation("eager")
    )
    model.load_state_dict(build_model(FAMILIES["llama"](), "eager").state_dict())
    return Backbone(model.eval(), make_tokenizer(), name="tiny", fingerprint="0" * 64)


@pytest.mark.parametrize(
    "method",
    [PTuning(), PromptTuning(), PrefixTuning(layers="embedding")],
    ids=["ptuning", "prompt", "embedding"],
)
def test_virtual_tokens_at_the_input_are_refused_where_a_model_takes_none(
    refusing: Backbone, method: Method
) -> None:
    error = refusal(refusing, method)
    assert_explained(error, "inputs_embeds", "method.type=prefix")
    assert error.fix is not None


def test_a_prefix_of_embeddings_is_refused_where_a_model_takes_none(
    causal: Backbone, refusing: Backbone
) -> None:
    with pytest.raises(WrongBackbone, match="embeddings"):
        random_prefix(causal, PromptTuning(num_virtual_tokens=3), 1).check(refusing)


@pytest.mark.parametrize("init", ["words", "random"])
def test_a_model_that_takes_no_embeddings_takes_keys_and_values(
    causal: Backbone, refusing: Backbone, init: Any
) -> None:
    """From words too: their activations are captured with ids."""
    method, user = PrefixTuning(num_virtual_tokens=3, init=init), user_rows("alice", 3, 1, 3)
    results = [
        train_user(backbone, method, TrainConfig(epochs=2), user) for backbone in (causal, refusing)
    ]
    expected, ours = (one.kv for one in results)
    assert expected is not None
    assert ours is not None
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


# Words


@pytest.mark.parametrize("method", [PrefixTuning(init_text=""), PromptTuning(init_text="")])
def test_words_without_tokens_are_refused(method: Method) -> None:
    rows = [Example(prompt="one", completion="two", split="train")]
    with pytest.raises(DataError, match="no tokens") as caught:
        encode_user(TEMPLATE, Recipe(method, TrainConfig()), "alice", rows)
    assert_explained(caught.value, "''", "init_text")
    assert caught.value.fix is not None


@pytest.mark.parametrize(
    "method",
    [
        PrefixTuning(num_virtual_tokens=3),
        PrefixTuning(num_virtual_tokens=3, encoder_hidden_size=4),
        PromptTuning(num_virtual_tokens=3),
        PTuning(),
    ],
)
def test_a_start_from_words_without_any_is_refused(causal: Backbone, method: Method) -> None:
    with pytest.raises(MethodError) as caught:
        method.initial(causal.facts, None, 0)
    assert_explained(caught.value, "no init words", "method.init=random")


def test_words_that_are_fewer_than_the_virtual_tokens_are_repeated() -> None:
    rows = [Example(prompt="one", completion="two", split="train", init_words="the fox")]
    method = PromptTuning(num_virtual_tokens=5, ensemble=2)
    words = encode_user(TEMPLATE, Recipe(method, TrainConfig()), "alice", rows).init_ids
    ids = TEMPLATE.ids("the fox")
    assert len(ids) < 10
    assert list(words) == (ids * 10)[:10]


# Prefixes that must not be used


def change_prefix(prefix: Prefix, **meta: Any) -> Prefix:
    return make_prefix(prefix.members, replace(prefix.meta, **meta))


def test_a_prefix_of_other_stacks_is_refused(causal: Backbone, pair: Backbone) -> None:
    method = PrefixTuning(num_virtual_tokens=3)
    whole = random_prefix(pair, method, 1)
    moved = change_prefix(whole, template_digest=causal.template.digest)
    with pytest.raises(WrongShape, match="stacks") as caught:
        moved.check(causal)
    assert_explained(caught.value, ENCODER, DECODER)
    of_decoder = {name: t for name, t in whole.tensors.items() if stack_of(name) == DECODER}
    partial = make_prefix([of_decoder], whole.meta)
    with pytest.raises(WrongShape, match="stacks") as caught:
        partial.check(pair)
    assert_explained(caught.value, CROSS)
    named = PrefixTuning(num_virtual_tokens=3, stacks=("decoder",))
    meta = PrefixMeta.of(pair, named, user_key=whole.meta.user_key)
    make_prefix([of_decoder], meta).check(pair)


def test_a_prefix_of_another_backbone_is_refused(causal: Backbone) -> None:
    for method in (PrefixTuning(num_virtual_tokens=3), PromptTuning(num_virtual_tokens=3)):
        other = change_prefix(random_prefix(causal, method, 1), backbone_fingerprint="1" * 64)
        with pytest.raises(WrongBackbone) as caught:
            other.check(causal)
        assert_explained(caught.value, "1" * 12, "0" * 12)


@pytest.mark.parametrize(
    "method",
    [
        PromptTuning(num_virtual_tokens=3),
        PromptTuning(num_virtual_tokens=3, ensemble=2),
        PTuning(template="{p:1}{prompt}{p:2}"),
    ],
    ids=["prompt", "ensemble", "ptuning"],
)
def test_embeddings_of_another_shape_are_refused(causal: Backbone, method: Method) -> None:
    prefix = random_prefix(causal, method, 1)
    prefix.check(causal)
    *others, member = prefix.members
    last = member[EMBEDDINGS]
    for wrong in (last[:, 1:], last[1:], torch.cat([last, last[:1]])):
        broken = make_prefix([*others, {EMBEDDINGS: wrong}], prefix.meta)
        with pytest.raises(WrongShape) as caught:
            broken.check(causal)
        assert_explained(caught.value, str(tuple(wrong.shape)), f"(3, {causal.facts.hidden_size})")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "method",
    [
        PrefixTuning(num_virtual_tokens=3),
        PromptTuning(num_virtual_tokens=3, ensemble=2),
        PTuning(template="{p:1}{prompt}{p:2}"),
    ],
    ids=["prefix", "ensemble", "ptuning"],
)
def test_values_that_are_not_finite_are_refused(
    causal: Backbone, method: Method, value: float
) -> None:
    prefix = random_prefix(causal, method, 1)
    members = prefix.members
    name, values = list(members[-1].items())[-1]
    values.view(-1)[-1] = value
    with pytest.raises(CorruptArtifact, match="not finite") as caught:
        make_prefix(members, prefix.meta).check(causal)
    assert_explained(caught.value, f"1 of {values.numel()} in", name)


@pytest.mark.parametrize("family", [*FAMILIES, *SEQ2SEQ, *EAGER_ONLY])
def test_a_models_configuration_alone_says_enough_to_check_a_method(
    family: str, tmp_path: Path
) -> None:
    """The check runs before a cluster starts. The outline has the model's stacks, layers and
    positions."""
    config = {**FAMILIES, **SEQ2SEQ, **EAGER_ONLY}[family]()
    config.save_pretrained(tmp_path)
    seen, real = outline(str(tmp_path)), build(config).facts
    assert {stack: facts.layers for stack, facts in seen.stacks.items()} == {
        stack: facts.layers for stack, facts in real.stacks.items()
    }
    assert (seen.hidden_size, seen.vocab_size) == (real.hidden_size, real.vocab_size)
    assert seen.max_positions == real.max_positions
    assert (seen.decoder_start_id is None) == (real.decoder_start_id is None)
    with pytest.raises(MethodError, match="more layers"):
        PrefixTuning(layers=99).check(seen)


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "prompt"},
        {"placement": "infx"},
        {"layers": 1},
        {"layers": "embedding"},
        {"num_virtual_tokens": 7},
        {"stacks": ["encoder"]},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_a_prefix_that_its_method_would_not_make_is_refused(changes: dict[str, Any]) -> None:
    backbone = build(FAMILIES["llama"]())
    good = random_prefix(backbone, PrefixTuning(num_virtual_tokens=4), seed=1)
    texts = good.meta.to_texts()
    texts["method"] = json.dumps({**json.loads(texts["method"]), **changes})
    with pytest.raises(ArtifactError):
        Prefix.from_bytes(save_safetensors({**good.tensors}, texts), backbone)
    Prefix.from_bytes(good.to_bytes(), backbone)


def test_an_ensemble_with_a_member_more_or_less_is_refused() -> None:
    backbone = build(FAMILIES["llama"]())
    two = random_prefix(backbone, PromptTuning(num_virtual_tokens=4, ensemble=2), seed=1)
    assert len(Prefix.from_bytes(two.to_bytes(), backbone).members) == 2
    for members in (two.members[:1], (*two.members, two.members[0])):
        with pytest.raises(WrongMethod, match="members"):
            Prefix.from_bytes(make_prefix(members, two.meta).to_bytes(), backbone)
    texts = two.meta.to_texts()
    texts["method"] = texts["method"].replace('"mean"', '"max"')
    with pytest.raises(WrongMethod, match="cannot apply"):
        Prefix.from_bytes(save_safetensors({**two.tensors}, texts), backbone)


def test_keys_and_values_with_a_layout_at_the_input_are_refused() -> None:
    backbone = build(FAMILIES["llama"]())
    good = random_prefix(backbone, PrefixTuning(num_virtual_tokens=4), seed=1)
    texts = good.meta.to_texts() | {"layout": "{prompt}{p:3}"}
    with pytest.raises(WrongMethod, match="layout"):
        Prefix.from_bytes(save_safetensors({**good.tensors}, texts), backbone)


def test_an_encoder_without_anything_to_read_is_refused() -> None:
    template = replace(build(SEQ2SEQ["t5"]()).template, encoder_decoder=True)
    bare = Template(_BareTokenizer(template.tokenizer), "plain", encoder_decoder=True)
    with pytest.raises(DataError, match="encoder needs one"):
        bare.encode(Example(prompt="", completion="x"))


class _BareTokenizer:
    """A tokenizer that adds no tokens to a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **_options: Any) -> Any:
        return self._tokenizer(text, add_special_tokens=False)


# A custom method


class HiddenFromPrompt(KeysAndValuesTuning):
    """Keys and values that the prompt does not attend to: a rule that is not a setting."""

    type: Literal["whispering"] = "whispering"

    @property
    def visibility(self) -> Visibility:
        return Visibility(infix=True)


def test_a_methods_own_rule_of_visibility_holds_wherever_its_prefix_goes(
    causal: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saved prefix is scored with the visibility that it was trained with."""
    monkeypatch.delitem(METHODS, "whispering", raising=False)  # so that it is removed afterwards
    method = catalogue.register(HiddenFromPrompt)(num_virtual_tokens=4)
    examples = [Example(prompt=f"what is {n}", completion=f"it is {n} so") for n in range(12)]
    settings = TrainConfig(epochs=1, batch_size=4)
    trained = tune(causal, {"alice": examples}, method=method, train=settings)["alice"]
    assert trained.prefix is not None
    path = trained.prefix.save(tmp_path / "alice.safetensors")
    loaded = Prefix.load(path, causal)
    assert isinstance(loaded.method, HiddenFromPrompt)
    valid = [row for row in arrange(examples) if row.split == "valid"]
    (line,) = trained.history
    assert line["valid"] is not None
    assert nll(causal, valid, loaded) == pytest.approx(line["valid"], abs=1e-5)
    (member,) = make_ready(loaded, causal).members
    assert member.visibility == Visibility(infix=True)
    # With another rule, the same values compute something else.
    plain = PrefixMeta.of(causal, PrefixTuning(num_virtual_tokens=4), user_key="u")
    assert abs(nll(causal, valid, make_prefix(loaded.members, plain)) - line["valid"]) > 1e-3
    with pytest.raises(WrongMethod, match="PEFT cannot hold"):
        method.to_peft(causal.facts)


def test_a_name_belongs_to_one_method() -> None:
    class Another(KeysAndValuesTuning):
        type: Literal["prefix"] = "prefix"

    with pytest.raises(MethodError, match="the same name"):
        catalogue.register(Another)
    assert METHODS["prefix"] is PrefixTuning
    with pytest.raises(MethodError, match="no such tuning method"):
        catalogue.parse_method({"type": "lora"})


class Twice(KeysAndValuesTuning):
    """One trained tensor as both keys and values, and one that is not used."""

    type: Literal["twice"] = "twice"

    def initial(self, facts: Facts, start: dict[str, Tensor] | None, seed: int) -> Parameters:
        keys = super().initial(facts, start, seed).trained["decoder.0.keys"]
        return Parameters({"both": keys, "idle": torch.ones(3)})

    def compile(
        self, trained: dict[str, Tensor], fixed: dict[str, Tensor], facts: Facts
    ) -> dict[str, Tensor]:
        return {"decoder.0.keys": trained["both"], "decoder.0.values": trained["both"]}


def test_a_parameter_that_is_used_twice_learns_from_both_uses(causal: Backbone) -> None:
    method, user = Twice(num_virtual_tokens=3, init="random"), user_rows("alice", 6, 2)
    config = TrainConfig(epochs=2, batch_size=3, weight_decay=0.1)
    plain = train_user(causal, method, config, user)
    (packed,) = LocalDriver(causal).run(train_pack(causal, method, config, [user]))
    assert plain.kv is not None
    assert packed.kv is not None
    torch.testing.assert_close(packed.kv, plain.kv, atol=1e-5, rtol=0)
