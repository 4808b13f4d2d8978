"""A prefix inside attention equals the same keys and values in the cache, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_backbones import (
    FAMILIES,
    REFUSED,
    SEQ2SEQ,
    VOCAB,
    as_groups,
    as_layers,
    build,
    build_model,
    kv_shape,
    logits_of,
    random_ids,
    random_kv,
    random_row,
    row_prefix,
)
from tiny_model import make_tokenizer
from torch import Tensor
from transformers import DynamicCache

from ptuning.errors import UnsupportedModel
from ptuning.methods.prefix import PrefixTuning
from ptuning.model.attention import implementation
from ptuning.model.backbone import Backbone
from ptuning.model.batch import Dropout, PackPrefix, RowPrefix
from ptuning.model.facts import CROSS, DECODER, ENCODER
from ptuning.model.groups import split_groups
from ptuning.model.load import load_backbone
from ptuning.train.step import LocalDriver, Train, collate

KINDS = ("eager", "sdpa")
families = pytest.mark.parametrize("family", FAMILIES)
kinds = pytest.mark.parametrize("kind", KINDS)


def with_cache(model: Any, ids: list[int], kv_LPHD: Tensor) -> Tensor:
    """Logits `[T, V]` of a plain model with the prefix `[L, 2, H, P, D]` in its cache."""
    cache = DynamicCache()
    for layer, kv in enumerate(kv_LPHD):
        cache.update(kv[0].unsqueeze(0), kv[1].unsqueeze(0), layer)
    mask = torch.ones((1, kv_LPHD.shape[-2] + len(ids)), dtype=torch.long)
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), attention_mask=mask, past_key_values=cache)
    return output.logits[0]


@families
@kinds
def test_a_prefix_equals_the_same_keys_and_values_as_past_key_values(
    family: str, kind: str
) -> None:
    backbone = build(FAMILIES[family](), kind)
    plain = build_model(FAMILIES[family](), kind)
    kv, rows = random_kv(backbone, 5, seed=1, users=2), [random_ids(9, 1), random_ids(4, 2)]
    with torch.no_grad():
        ours = logits_of(backbone, rows, row_prefix(backbone, kv, [0, 1]))
        base = logits_of(backbone, rows, None)
    for row in range(2):
        expected = with_cache(plain, rows[row], kv[row])
        torch.testing.assert_close(ours[row], expected, atol=2e-5, rtol=1e-4)
        assert (ours[row] - base[row]).abs().max() > 1e-2, "the prefix changed nothing"


@families
def test_without_a_prefix_the_model_is_the_plain_model(family: str) -> None:
    backbone = build(FAMILIES[family]())
    rows = [random_ids(9, 1), random_ids(4, 2)]
    plain = build_model(FAMILIES[family](), "eager")
    with torch.no_grad():
        ours = logits_of(backbone, rows, None)
        for row, ids in enumerate(rows):
            expected = plain(input_ids=torch.tensor([ids])).logits[0]
            torch.testing.assert_close(ours[row], expected, atol=2e-5, rtol=1e-4)
        empty = logits_of(backbone, rows, backbone.empty_prefix(2))
    torch.testing.assert_close(torch.cat(empty), torch.cat(ours), atol=1e-6, rtol=0)


def compute_gradient(backbone: Backbone, kv: Tensor, rows: list[Any], slots: list[int]) -> Tensor:
    leaf = kv.clone().requires_grad_()
    batch = collate(rows, backbone.device)
    weights = torch.ones(len(batch.targets))

    def machine() -> Any:
        yield Train(
            batch, PackPrefix(as_groups(leaf), backbone.facts), torch.tensor(slots), weights
        )

    LocalDriver(backbone).run(machine())
    assert leaf.grad is not None
    return leaf.grad


@families
@kinds
def test_gradients_reach_every_layers_keys_and_values_and_no_weight(family: str, kind: str) -> None:
    backbone = build(FAMILIES[family](), kind)
    kv = random_kv(backbone, 4, seed=3, users=2)
    grad = compute_gradient(backbone, kv, [random_row(9, 6, 1), random_row(6, 3, 2)], [0, 1])
    norms = grad.flatten(3).norm(dim=-1)  # [U, L, 2]
    assert bool((norms > 1e-6).all()), norms
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())


@families
def test_gradient_checkpointing_changes_no_gradient_and_recomputes(family: str) -> None:
    rows, slots = [random_row(9, 6, 1), random_row(6, 3, 2), random_row(7, 4, 3)], [1, 0, 1]
    plain = build(FAMILIES[family]())
    kv = random_kv(plain, 4, seed=3, users=2)
    checkpointed = build(FAMILIES[family](), gradient_checkpointing=True)
    calls = 0

    def count(*_args: Any) -> None:
        nonlocal calls
        calls += 1

    for module in checkpointed.model.modules():
        if getattr(module, "_ptuning_layer", None) is not None:
            module.register_forward_hook(count)
    grad = compute_gradient(checkpointed, kv, rows, slots)
    torch.testing.assert_close(grad, compute_gradient(plain, kv, rows, slots), atol=1e-6, rtol=1e-5)
    layers = plain.facts.stacks[DECODER].layers
    assert calls == 2 * layers, "layers were not recomputed in the backward pass"


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_gradient_checkpointing_keeps_dropout_off(family: str) -> None:
    config = FAMILIES[family]()  # dropout of 0.1, in modules or as the layers' argument
    backbone = build(config, gradient_checkpointing=True)
    kv = random_kv(backbone, 3, seed=1)
    rows = [random_row(9, 6, 1)]
    first, second = (compute_gradient(backbone, kv, rows, [0]) for _ in range(2))
    assert torch.equal(first, second)


@families
@kinds
def test_left_and_right_padding_give_the_same_logits(family: str, kind: str) -> None:
    backbone = build(FAMILIES[family](), kind)
    kv = random_kv(backbone, 4, seed=5, users=2)
    rows = [random_ids(9, 1), random_ids(3, 2), random_ids(1, 3)]
    with torch.no_grad():
        left = logits_of(backbone, rows, row_prefix(backbone, kv, [0, 1, 0]), side="left")
        right = logits_of(backbone, rows, row_prefix(backbone, kv, [0, 1, 0]), side="right")
    torch.testing.assert_close(torch.cat(left), torch.cat(right), atol=2e-5, rtol=1e-4)


@families
@kinds
def test_rows_with_prefixes_of_different_lengths_equal_each_alone(family: str, kind: str) -> None:
    backbone = build(FAMILIES[family](), kind)
    lengths, rows = [2, 6, 0], [random_ids(7, 1), random_ids(5, 2), random_ids(4, 3)]
    own = [random_kv(backbone, length, seed=length)[0] for length in lengths]
    longest = max(lengths)
    padded = torch.full((3, *kv_shape(backbone, longest)), 7.0)  # padding must not be visible
    for row, length in enumerate(lengths):
        padded[row, ..., longest - length :, :] = own[row]
    mixed = RowPrefix(split_groups(as_groups(padded), backbone.facts, 1), torch.tensor(lengths))
    with torch.no_grad():
        together = logits_of(backbone, rows, mixed)
        for row, length in enumerate(lengths):
            prefix = row_prefix(backbone, own[row].unsqueeze(0), [0]) if length else None
            (alone,) = logits_of(backbone, [rows[row]], prefix)
            torch.testing.assert_close(together[row], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@kinds
def test_a_rows_output_ignores_its_neighbours_prefixes_and_texts(family: str, kind: str) -> None:
    backbone = build(FAMILIES[family](), kind)
    kv, rows = random_kv(backbone, 4, seed=5, users=3), [random_ids(7, n) for n in range(3)]
    with torch.no_grad():
        before = logits_of(backbone, rows, row_prefix(backbone, kv, [0, 1, 2]))
        changed = kv.clone()
        changed[0], changed[2] = 1e3, -1e3
        after = logits_of(
            backbone,
            [random_ids(7, 9), rows[1], random_ids(7, 8)],
            row_prefix(backbone, changed, [0, 1, 2]),
        )
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])


def test_a_non_finite_neighbour_does_not_reach_a_rows_loss_or_gradient() -> None:
    backbone = build(FAMILIES["llama"]())
    kv, rows = random_kv(backbone, 4, seed=5, users=2), [random_row(7, 4, 1), random_row(7, 4, 2)]
    clean = compute_gradient(backbone, kv, rows, [0, 1])
    kv[1] = float("inf")
    assert torch.equal(compute_gradient(backbone, kv, rows, [0, 1])[0], clean[0])


def make_windowed_config(family: str, window: int) -> Any:
    config = FAMILIES[family]()
    config.sliding_window = window
    return config


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@kinds
def test_beyond_a_sliding_window_the_prefix_stays_visible(family: str, kind: str) -> None:
    """The last of 20 tokens, far outside a window of 4, still sees the prefix directly: a model of
    one layer notices a change of the prefix there."""
    config = make_windowed_config(family, 4)
    config.num_hidden_layers = 1
    if family == "gemma3":
        config.layer_types = ["sliding_attention"]
    backbone = build(config, kind)
    kv = random_kv(backbone, 3, seed=1)
    changed = kv.clone()
    changed[:, :, 1] += 1.0  # a change of the values must show
    ids = random_ids(20, 1)
    with torch.no_grad():
        (one,) = logits_of(backbone, [ids], row_prefix(backbone, kv, [0]))
        (two,) = logits_of(backbone, [ids], row_prefix(backbone, changed, [0]))
        # The window still works: the last token does not see the first.
        (three,) = logits_of(
            backbone, [[*random_ids(1, 7), *ids[1:]]], row_prefix(backbone, kv, [0])
        )
    assert bool(((one - two).abs().amax(-1) > 1e-4).all())
    torch.testing.assert_close(three[-1], one[-1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@kinds
def test_a_sliding_window_counts_real_tokens_only(family: str, kind: str) -> None:
    """Inside the window a prefix in the cache and ours agree. Beyond it they differ."""
    backbone = build(make_windowed_config(family, 8), kind)
    plain = build_model(make_windowed_config(family, 8), kind)
    kv, ids = random_kv(backbone, 3, seed=1), random_ids(20, 1)
    with torch.no_grad():
        (ours,) = logits_of(backbone, [ids], row_prefix(backbone, kv, [0]))
    cached = with_cache(plain, ids, kv[0])
    torch.testing.assert_close(ours[:5], cached[:5], atol=2e-5, rtol=1e-4)  # P + 5 = window
    assert (ours[-1] - cached[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_sdpa_and_eager_agree(family: str) -> None:
    rows = [random_ids(9, 1), random_ids(4, 2)]
    results = []
    for kind in KINDS:
        backbone = build(FAMILIES[family](), kind)
        kv = random_kv(backbone, 5, seed=1, users=2)
        with torch.no_grad():
            results.append(torch.cat(logits_of(backbone, rows, row_prefix(backbone, kv, [0, 1]))))
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", REFUSED)
@kinds
def test_a_model_that_cannot_take_a_prefix_is_refused_when_it_is_loaded(
    family: str, kind: str, tmp_path: Path
) -> None:
    build_model(REFUSED[family](), "eager").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel) as caught:
        load_backbone(str(tmp_path), dtype="float32", attention=kind, device="cpu")
    error = caught.value
    assert family in str(error.seen).lower()
    assert any(word in str(error.expected) for word in ("Llama", "causal", "Mixtral"))
    assert "another backbone" in str(error.fix)
    assert "ptuning_" not in str(error)


def test_keys_and_values_of_different_shapes_are_refused() -> None:
    config = transformers.DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    with pytest.raises(UnsupportedModel, match="different shapes"):
        build(config)


def test_a_prefix_of_more_layers_than_the_model_has_is_refused() -> None:
    backbone = build(FAMILIES["llama"]())
    prefix = row_prefix(backbone, random_kv(backbone, 2, seed=1), [0])
    prefix.layers[DECODER] = (*prefix.layers[DECODER], prefix.layers[DECODER][0])  # a third layer
    with pytest.raises(UnsupportedModel, match="more layers than the model"):
        logits_of(backbone, [[3, 4]], prefix)


def test_a_model_that_stopped_using_our_attention_is_refused_at_the_next_call() -> None:
    backbone = build(FAMILIES["llama"](), debug=False)
    model: Any = backbone.model
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModel, match="does not use this library's attention"):
        logits_of(backbone, [[3, 4]], row_prefix(backbone, random_kv(backbone, 2, seed=1), [0]))


def test_a_model_called_without_a_plan_raises_rather_than_sees_the_future() -> None:
    """Without a plan there is no mask, so tokens would attend to later tokens."""
    backbone = build(FAMILIES["llama"]())
    with pytest.raises(UnsupportedModel, match="without an attention plan"):
        backbone.model(input_ids=torch.tensor([[3, 4]]))


def test_in_debug_mode_a_layer_that_did_not_take_its_prefix_raises() -> None:
    backbone = build(FAMILIES["llama"](), debug=True)
    inside: Any = backbone.model
    attention = inside.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    with pytest.raises(UnsupportedModel, match="every attention layer"):
        logits_of(backbone, [[3, 4]], row_prefix(backbone, random_kv(backbone, 2, seed=1), [0]))


def test_a_layer_that_attends_at_first_and_not_with_a_prefix_is_refused_at_load() -> None:
    model = build_model(FAMILIES["llama"](), implementation("eager"))
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def forget(hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
        return forward(hidden_states, **kwargs)

    attention.forward = forget
    with pytest.raises(UnsupportedModel, match="every attention layer"):
        Backbone(model, make_tokenizer(), name="tiny", fingerprint="0" * 64)


def test_an_attention_module_that_appears_after_loading_is_refused() -> None:
    backbone = build(FAMILIES["llama"]())
    inside: Any = backbone.model
    attention = inside.model.layers[1].self_attn
    del attention._ptuning_layer
    with pytest.raises(UnsupportedModel, match="not there when the backbone was loaded"):
        logits_of(backbone, [[3, 4]], row_prefix(backbone, random_kv(backbone, 2, seed=1), [0]))


@pytest.mark.parametrize("mask", [None, torch.zeros((1, 1, 2, 2))])
def test_a_layer_with_a_mask_of_its_own_making_is_refused_rather_than_guessed(mask: Any) -> None:
    model = build_model(FAMILIES["llama"](), implementation("eager"))
    attention = model.model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *a, **k: forward(*a, **(k | {"attention_mask": mask}))
    with pytest.raises(UnsupportedModel, match="unknown kind"):
        Backbone(model, make_tokenizer(), name="tiny", fingerprint="0" * 64)


def test_captured_activations_as_a_prefix_continue_the_text() -> None:
    """A prefix made of a text's activations predicts what the text would."""
    backbone = build(FAMILIES["llama"]())
    words, rest = random_ids(6, 1), random_ids(5, 2)
    with torch.no_grad():
        captured, _ = backbone.capture(torch.tensor([words]))
        (whole,) = logits_of(backbone, [words + rest], None)
        (ours,) = logits_of(backbone, [rest], row_prefix(backbone, as_layers(captured), [0]))
    torch.testing.assert_close(ours, whole[6:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["t5", "t5_gated", "bart"])
def test_captured_activations_equal_the_plain_models_cache(family: str) -> None:
    """In encoder, decoder and cross attention, with the words at both inputs."""
    backbone, words = build(SEQ2SEQ[family](), "eager"), torch.tensor([random_ids(6, 1)])
    captured, _ = backbone.capture(words)
    plain = build_model(SEQ2SEQ[family](), "eager")
    seen: list[Tensor] = []
    own = [
        module
        for name, module in plain.get_encoder().named_modules()
        if name.rpartition(".")[2] in ("k", "v", "k_proj", "v_proj")
    ]
    for module in own:
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        cache = plain(input_ids=words, decoder_input_ids=words, use_cache=True).past_key_values
    facts = backbone.facts.stacks[ENCODER]
    (group,) = facts.groups
    encoder = [one.view(1, 6, group.heads, group.key_width).transpose(1, 2) for one in seen]
    assert len(encoder) == 2 * facts.layers
    for layer in range(facts.layers):
        for part in (0, 1):
            torch.testing.assert_close(
                as_layers(captured, ENCODER)[:, layer, part],
                encoder[2 * layer + part],
                atol=1e-5,
                rtol=1e-5,
            )
    for stack, kept in (
        (DECODER, cache.self_attention_cache),
        (CROSS, cache.cross_attention_cache),
    ):
        assert len(kept.layers) == backbone.facts.stacks[stack].layers
        for layer, one in enumerate(kept.layers):
            for part, values in enumerate((one.keys, one.values)):
                torch.testing.assert_close(
                    as_layers(captured, stack)[:, layer, part], values, atol=1e-5, rtol=1e-5
                )


def test_the_top_layers_start_from_their_own_activations() -> None:
    backbone, words = build(FAMILIES["llama"]()), random_ids(3, 1)
    method = PrefixTuning(num_virtual_tokens=3, layers=1)
    captured, _ = backbone.capture(torch.tensor([words]))
    start = {name: values[0] for name, values in captured.items()}
    kv, whole = as_layers(method.initial(backbone.facts, start, 0).trained), as_layers(start)
    torch.testing.assert_close(kv, whole[-1:])
    assert (kv - whole[:1]).abs().max() > 0.1


def test_dropout_zeroes_a_share_and_scales_the_rest() -> None:
    """A row's mask depends only on its seed, not on the other rows."""
    values = torch.ones((2, 4, 2, 2, 50, 8))
    dropped = Dropout(0.3, (5, 6))("decoder", values)
    assert 0.25 < float((dropped == 0).float().mean()) < 0.35
    torch.testing.assert_close(dropped[dropped != 0].unique(), torch.tensor([1 / 0.7]))
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(Dropout(0.3, (6,))("decoder", values[:1])[0], dropped[1])
    assert not torch.equal(Dropout(0.3, (6,))("cross", values[:1])[0], dropped[1])


def test_only_supervised_positions_are_scored_with_the_plain_models_loss() -> None:
    backbone, plain = build(FAMILIES["gpt2"]()), build_model(FAMILIES["gpt2"](), "eager")
    rows = [random_row(9, 6, 1), random_row(6, 3, 2)]
    batch = collate(rows, backbone.device)
    with torch.no_grad():
        nll = backbone.token_nll(batch, None)
        expected = []
        for row in rows:
            logits = plain(input_ids=torch.tensor([row.input_ids])).logits[0]
            loss = torch.nn.functional.cross_entropy(
                logits[:-1], torch.tensor(row.labels[1:]), reduction="none", ignore_index=-100
            )
            expected.append(loss[torch.tensor(row.labels[1:]) != -100])
    assert len(nll) == 9
    torch.testing.assert_close(nll, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_an_unknown_kind_of_attention_is_an_error() -> None:
    with pytest.raises(ValueError, match="flash"):
        implementation("flash")
