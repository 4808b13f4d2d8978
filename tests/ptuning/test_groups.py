"""Prefixes for a stack with layers of two shapes, in which keys and values differ in width.

No supported model has such a stack yet. The tests cover training, saving, loading and serving."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from ptuning.data.encode import Template
from ptuning.errors import WrongMethod, WrongShape
from ptuning.methods import catalogue
from ptuning.methods.base import KeysAndValuesTuning, Method
from ptuning.methods.prefix import PrefixTuning
from ptuning.model.batch import PackPrefix
from ptuning.model.facts import CROSS, DECODER, ENCODER, Facts, GroupFacts, StackFacts
from ptuning.model.groups import split_groups, stack_groups
from ptuning.prefix.artifact import Prefix, PrefixMeta, make_prefix, pack_prefix
from ptuning.prefix.ready import make_ready, rows_of
from ptuning.train.config import TrainConfig
from ptuning.train.slots import Slots
from serve.engine.slots import SlotCache

P = 3
CPU = torch.device("cpu")
# From the top: three layers of local attention for each layer of global attention.
LOCAL = GroupFacts(layers=(4, 2, 1), heads=2, key_width=6, value_width=4)
GLOBAL = GroupFacts(layers=(3, 0), heads=1, key_width=8, value_width=12)
FACTS = Facts(
    stacks={DECODER: StackFacts(groups=(LOCAL, GLOBAL))},
    hidden_size=10,
    vocab_size=300,
    max_positions=64,
)
WIDTHS = [(2, 6, 4), (1, 8, 12), (2, 6, 4), (2, 6, 4), (1, 8, 12)]  # H, Dk, Dv, lowest layer first


class PlainKeysAndValues(KeysAndValuesTuning):
    """Keys and values that are trained directly, with the base class only."""

    type: Literal["plainly"] = "plainly"


METHODS: dict[str, Method] = {
    "direct": PrefixTuning(num_virtual_tokens=P, init="random"),
    "mlp": PrefixTuning(num_virtual_tokens=P, init="random", encoder_hidden_size=5),
    "mlp of keys": PrefixTuning(
        num_virtual_tokens=P, init="random", encoder_hidden_size=5, encoder_input="keys"
    ),
    "mlp on words": PrefixTuning(num_virtual_tokens=P, encoder_hidden_size=5),
    "top three": PrefixTuning(num_virtual_tokens=P, init="random", layers=3),
    "the top one": PrefixTuning(num_virtual_tokens=P, layers=1),
    "base": PlainKeysAndValues(num_virtual_tokens=P),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


def init_activations(seed: int = 1) -> dict[str, Tensor]:
    """Activations of P init words in every layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) for name, shape in FACTS.kv_shapes(P).items()
    }


def start_of(method: Method) -> dict[str, Tensor] | None:
    return None if method.start_ids == "none" else init_activations()


def backbone(tokenizer: Any) -> Any:
    """The parts of a backbone that a prefix needs, without a model."""
    return SimpleNamespace(
        facts=FACTS,
        name="two shapes",
        fingerprint="0" * 64,
        template=Template.of(tokenizer),
        dtype=torch.float32,
        device=CPU,
    )


def depth_of(method: Method) -> int:
    return method.layers if isinstance(getattr(method, "layers", None), int) else 5  # type: ignore[attr-defined]


@methods
def test_a_method_makes_what_its_shapes_say(method: Method) -> None:
    shapes = method.shapes(FACTS)
    initial = [method.initial(FACTS, start_of(method), seed) for seed in range(2)]
    compiled = method.compile(
        {name: torch.stack([one.trained[name] for one in initial]) for name in initial[0].trained},
        {name: torch.stack([one.fixed[name] for one in initial]) for name in initial[0].fixed},
        FACTS,
    )
    assert {name: tuple(values.shape[1:]) for name, values in compiled.items()} == shapes
    layers = split_groups(compiled, FACTS, 1)[DECODER]
    assert [(k.shape[1:], v.shape[1:]) for k, v in layers] == [
        ((heads, P, keys), (heads, P, values))
        for heads, keys, values in WIDTHS[-depth_of(method) :]
    ]
    if method.start_ids == "words":  # each layer starts as the words' activations in it
        of_words = split_groups(init_activations(), FACTS, 0)[DECODER][-depth_of(method) :]
        for (keys, values), (wanted_keys, wanted_values) in zip(layers, of_words, strict=True):
            assert torch.equal(keys[0], wanted_keys)
            assert torch.equal(values[1], wanted_values)


@methods
def test_every_group_learns_and_each_slot_alone(method: Method) -> None:
    """A loss on one user's keys and values changes that user's parameters, in every layer."""
    initial = [method.initial(FACTS, start_of(method), seed) for seed in range(2)]
    slots = Slots(method, FACTS, initial, CPU)
    before, leaves = copies(slots), slots.leaves()
    for _ in range(
        2
    ):  # an MLP's last layer starts at zero: earlier ones move from the second update
        rows = leaves.of_rows(torch.tensor([1, 1]), torch.float32).layers[DECODER]
        both = [part for pair in rows for part in pair]
        torch.stack([(part.square() + part).sum() for part in both]).sum().backward()
        slots.update(leaves, [1], [0.05], TrainConfig())
        leaves = slots.leaves()
    after = copies(slots)
    for name, old in before.items():
        new = after[name]
        assert torch.equal(old[0], new[0]), name
        assert bool(((old[1] - new[1]).flatten(1).abs().amax(1) > 1e-3).all()), name
    slots.keep_best(1, slots.compiled())
    slots.reset(1)
    assert all(torch.equal(values, before[name]) for name, values in copies(slots).items())


def copies(slots: Slots) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in slots.compiled().tensors.items()}


@methods
def test_a_prefix_of_two_groups_is_saved_loaded_and_ready(
    method: Method, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = backbone(tokenizer)
    generator = torch.Generator().manual_seed(2)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in method.shapes(FACTS).items()
    }
    monkeypatch.setitem(catalogue.METHODS, "plainly", PlainKeysAndValues)
    prefix = make_prefix([tensors], PrefixMeta.of(there, method, user_key="u" * 52))
    again = Prefix.from_bytes(prefix.to_bytes(), there)
    assert again == prefix
    assert all(torch.equal(again.tensors[name], values) for name, values in tensors.items())
    wanted = {"decoder.0": (4, 2, 1), "decoder.1": (3, 0)}
    if depth_of(method) == 3:
        wanted = {"decoder.0": (2, 1), "decoder.1": (0,)}
    if depth_of(method) == 1:
        wanted = {"decoder.1": (0,)}
    assert dict(again.meta.layers) == wanted
    layers = split_groups(tensors, FACTS, 0)[DECODER]
    (member,) = make_ready(again, there).members
    assert assert_same(member.layers[DECODER], layers)
    assert assert_same(
        rows_of_pack(pack_prefix([again], there)), [(k[None], v[None]) for k, v in layers]
    )


def rows_of_pack(pack: PackPrefix) -> Any:
    return pack.of_rows(torch.tensor([0]), torch.float32).layers[DECODER]


def assert_same(ours: Any, expected: Any) -> bool:
    pairs = zip(ours, expected, strict=True)
    return all(torch.equal(k, wk) and torch.equal(v, wv) for (k, v), (wk, wv) in pairs)


def test_rows_of_different_lengths_and_depths_share_a_batch(tokenizer: Any) -> None:
    there = backbone(tokenizer)
    ready = []
    for seed, method in enumerate(
        (PrefixTuning(num_virtual_tokens=2, layers=3), PrefixTuning(num_virtual_tokens=4))
    ):
        generator = torch.Generator().manual_seed(seed)
        tensors = {n: torch.randn(s, generator=generator) for n, s in method.shapes(FACTS).items()}
        meta = PrefixMeta.of(there, method, user_key="u" * 52)
        ready.append(make_ready(make_prefix([tensors], meta), there).members[0])
    rows = rows_of(there, [*ready, None])
    assert rows is not None
    for number, (keys, values) in enumerate(rows.layers[DECODER]):
        heads, key_width, value_width = WIDTHS[number]
        assert keys.shape == (3, heads, 4, key_width)
        assert values.shape == (3, heads, 4, value_width)
        assert torch.equal(keys[1], ready[1].layers[DECODER][number][0])
        if number >= 2:
            assert torch.equal(values[0, :, 2:], ready[0].layers[DECODER][number - 2][1])
        else:
            assert not keys[0].any()
    assert rows.depths[DECODER].tolist() == [3, 5, 0]


def test_splitting_layers_into_groups_can_be_undone() -> None:
    layers = {DECODER: split_groups(init_activations(), FACTS, 0)[DECODER]}
    again = stack_groups(layers, FACTS, 0)
    assert again.keys() == init_activations().keys()
    assert all(torch.equal(again[name], values) for name, values in init_activations().items())


def test_a_prefix_that_leaves_out_a_layer_below_its_top_is_refused() -> None:
    tensors = {
        name: values for name, values in init_activations().items() if name.startswith("decoder.0")
    }
    with pytest.raises(WrongShape, match="skips layers"):
        split_groups(tensors, FACTS, 0)


def test_a_service_keeps_each_layer_in_its_own_shape() -> None:
    cache = SlotCache(FACTS.stacks[DECODER], rows=2, dtype=torch.float32, device=CPU)
    layers = split_groups(init_activations(), FACTS, 0)[DECODER][-3:]
    cache.enter(1, layers)
    assert [(s.keys.shape[1], s.keys.shape[3], s.values.shape[3]) for s in cache.slots] == WIDTHS
    for slot, (keys, values) in zip(cache.slots[-3:], layers, strict=True):
        assert torch.equal(slot.keys[1, :, :P], keys)
        assert torch.equal(slot.values[1, :, :P], values)
        assert not slot.keys[0].any()
    cache.move(1, 0)
    assert not any(bool(slot.values[1].any()) for slot in cache.slots)
    cache.enter(0, None)
    assert not any(bool(slot.keys.any()) for slot in cache.slots)


def test_pefts_files_have_one_shape_only() -> None:
    with pytest.raises(WrongMethod, match="several shapes"):
        PrefixTuning(num_virtual_tokens=P).to_peft(FACTS)
    apart = StackFacts(groups=(GroupFacts(layers=(0,), heads=1, key_width=6, value_width=4),))
    facts = Facts(stacks={DECODER: apart}, hidden_size=4, vocab_size=9, max_positions=None)
    with pytest.raises(WrongMethod, match="several shapes"):
        PrefixTuning(num_virtual_tokens=P).to_peft(facts)


def test_stacks_have_groups_of_their_own() -> None:
    both = StackFacts(groups=(LOCAL, GLOBAL))
    one = StackFacts.of_one_shape(layers=2, heads=3, head_dim=7)
    facts = Facts(
        stacks={ENCODER: one, DECODER: both, CROSS: one},
        hidden_size=10,
        vocab_size=9,
        max_positions=None,
        decoder_start_id=0,
    )
    shapes = PrefixTuning(num_virtual_tokens=P, layers=1, stacks=("decoder", "cross")).shapes(facts)
    assert shapes == {
        "decoder.1.keys": (1, 1, P, 8),
        "decoder.1.values": (1, 1, P, 12),
        "cross.0.keys": (1, 3, P, 7),
        "cross.0.values": (1, 3, P, 7),
    }
