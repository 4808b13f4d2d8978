"""What every method must satisfy, for all methods of the catalogue."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from method_catalogue import CATALOGUE, select_for_causal_models, select_served
from tiny_backbones import FAMILIES, build, random_prefix, user_rows

import ptuning
from ptuning.errors import WrongMethod
from ptuning.generation import generate
from ptuning.methods import DEFAULT, REGISTERED
from ptuning.methods.base import Method
from ptuning.methods.catalogue import METHODS, default_method, parse_method
from ptuning.model.backbone import Backbone
from ptuning.prefix.artifact import Prefix, PrefixMeta, make_prefix
from ptuning.prefix.peft_format import load_peft, save_peft
from ptuning.train.config import TrainConfig, Trained
from ptuning.train.packed import train_pack
from ptuning.train.resume import Belongs, Resume
from ptuning.train.state import TrainState
from ptuning.train.step import LocalDriver

CAUSAL = {name: entry.method for name, entry in select_for_causal_models().items()}
every_method = pytest.mark.parametrize("method", CAUSAL.values(), ids=list(CAUSAL))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return build(FAMILIES["llama"]())


def test_the_catalogue_has_every_registered_method_in_every_kind_of_test() -> None:
    """A registered method that the catalogue lacks fails here."""
    entries = CATALOGUE.values()
    assert {entry.method.type for entry in entries} == set(METHODS)
    for kind in ("fast", "served", "pairs", "run"):
        held = {entry.method.type for entry in entries if getattr(entry, kind)}
        assert held == set(METHODS), f"no {kind} entry for {set(METHODS) - held}"


def test_a_registered_method_is_a_public_name_and_a_type_checkers_too() -> None:
    assert {kind.__name__ for kind in METHODS.values()} == set(REGISTERED)
    tree = ast.parse(Path(ptuning.__file__).read_text(encoding="utf-8"))
    (typing_only,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module
        for node in typing_only.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    methods = {name for name, file in typed.items() if str(file).startswith("ptuning.methods.")}
    assert methods == {*REGISTERED}, "a name that type checkers see exists at run time"
    for name, file in REGISTERED.items():
        assert getattr(ptuning, name) in METHODS.values()
        assert name in ptuning.__all__
        assert typed.get(name) == f"ptuning.methods.{file}"


def test_the_default_method_is_the_one_that_is_named() -> None:
    assert default_method() == METHODS[DEFAULT]()


@pytest.mark.parametrize("method", [entry.method for entry in CATALOGUE.values()], ids=[*CATALOGUE])
def test_a_method_can_be_parsed_from_its_settings(method: Method) -> None:
    assert parse_method(method.model_dump()) == method
    assert parse_method(json.loads(json.dumps(method.model_dump(mode="json")))) == method


@every_method
def test_a_prefix_is_saved_and_loaded_as_its_method_makes_it(
    method: Method, backbone: Backbone, tmp_path: Path
) -> None:
    prefix = random_prefix(backbone, method, 1)
    again = Prefix.load(prefix.save(tmp_path / "p"), backbone, digest=prefix.digest)
    assert again == prefix
    assert again.method == method
    assert len(again.members) == method.members
    assert again.shapes == method.shapes(backbone.facts)
    for name, values in again.tensors.items():
        assert torch.equal(values, prefix.tensors[name])


@every_method
def test_a_prefix_is_saved_as_the_declared_peft_type_or_refused(
    method: Method, backbone: Backbone, tmp_path: Path
) -> None:
    """tests/parity/test_peft_format.py tests that PEFT computes the same."""
    prefix = random_prefix(backbone, method, 1)
    (kind,) = (entry.peft for entry in CATALOGUE.values() if entry.method is method)
    if kind is None:
        with pytest.raises(WrongMethod, match="PEFT cannot hold"):
            save_peft(prefix, tmp_path / "adapter", backbone)
        assert not (tmp_path / "adapter").exists()
        return
    save_peft(prefix, tmp_path / "adapter", backbone)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["peft_type"] == kind
    assert load_peft(tmp_path / "adapter", backbone) == prefix


def train(
    backbone: Backbone, method: Method, epochs: int, states: tuple[TrainState, ...] = ()
) -> Trained:
    config = TrainConfig(
        epochs=epochs, batch_size=3, schedule="constant", patience=None, keep_resume=True
    )
    user = user_rows("alice", train=5, valid=2, init_ids=method.num_virtual_tokens * method.members)
    user = replace(user, states=states)
    (result,) = LocalDriver(backbone).run(train_pack(backbone, method, config, [user]))
    assert result.members is not None, result.error
    return result


@every_method
def test_a_training_continued_from_its_state_equals_an_uninterrupted_one(
    method: Method, backbone: Backbone
) -> None:
    belongs = Belongs("alice", "default", backbone.fingerprint, "settings")
    first = Resume(train(backbone, method, 1).states, belongs)
    read = Resume.from_bytes(first.to_bytes())
    read.check(belongs, method, backbone.facts, epochs=2)
    further, whole = train(backbone, method, 2, read.states), train(backbone, method, 2)
    assert further.members is not None
    assert whole.members is not None
    for ours, expected in zip(further.members, whole.members, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    prefix = make_prefix(further.members, PrefixMeta.of(backbone, method, user_key="alice"))
    prefix.check(backbone)


def test_all_methods_in_one_batch_are_answered_as_each_alone(backbone: Backbone) -> None:
    """test_families.py tests more families, windows and encoder-decoder models."""
    methods = select_served()
    prefixes = [random_prefix(backbone, method, n) for n, method in enumerate(methods.values())]
    prompts = [f"what is number {n} " * (1 + n % 3) for n in range(len(prefixes))]
    alone = [
        generate(backbone, [prompt], [prefix], max_new_tokens=5)[0]
        for prompt, prefix in zip(prompts, prefixes, strict=True)
    ]
    assert generate(backbone, prompts, prefixes, max_new_tokens=5) == alone
