"""Forward and backward passes on device `meta`, which has no values.

A CPU tensor among the operands, or reading a value, raises an error. So the same code never waits
for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_backbones import (
    EAGER_ONLY,
    FAMILIES,
    SEQ2SEQ,
    SHARING,
    build_model,
    random_row,
    with_window,
)
from tiny_model import make_tokenizer
from transformers import PreTrainedConfig

from ptuning.methods.base import Method
from ptuning.methods.prefix import PrefixTuning
from ptuning.methods.prompt import PromptTuning
from ptuning.model.attention import implementation
from ptuning.model.attention_plan import Tokens
from ptuning.model.backbone import Backbone
from ptuning.model.batch import EMBEDDINGS, Dropout, PackPrefix, RowPrefix, Visibility
from ptuning.train.step import collate

META = torch.device("meta")
# Torch's grouped product has no meta kernel for these experts.
NO_META = {"mixtral", "qwen3_moe"}
CONFIGS: dict[str, Any] = {
    name: config
    for name, config in {**FAMILIES, **SEQ2SEQ, **EAGER_ONLY, **SHARING}.items()
    if name not in NO_META
}
CONFIGS |= {
    f"{name}, window": lambda name=name: with_window(name, 4) for name in ("mistral", "gemma3")
}
METHODS: dict[str, Method] = {
    "prefix": PrefixTuning(num_virtual_tokens=3),
    "top layer": PrefixTuning(num_virtual_tokens=3, layers=1),
    "prompt": PromptTuning(num_virtual_tokens=3),
}


def on_meta(config: PreTrainedConfig, kind: str) -> Backbone:
    with torch.device("meta"):
        model = build_model(config, implementation(kind))
    return Backbone(model, make_tokenizer(), name="tiny", fingerprint="0" * 64)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_a_microbatch_needs_nothing_of_the_host(family: str, kind: str) -> None:
    if family in EAGER_ONLY and kind == "sdpa":
        pytest.skip("it has eager attention alone")
    backbone = on_meta(CONFIGS[family](), kind)
    start = backbone.facts.decoder_start_id
    rows = [random_row(9, 6, 1), random_row(6, 3, 2)]
    batch = collate(rows, META, start)
    visibilities = [Visibility(), Visibility(windowed=True)]
    if start is None:
        visibilities.append(Visibility(infix=True))
    for method in METHODS.values():
        tensors = {
            name: torch.zeros((2, *shape), device=META, requires_grad=True)
            for name, shape in method.shapes(backbone.facts).items()
        }
        for visibility in visibilities if EMBEDDINGS not in tensors else visibilities[:1]:
            slots = torch.zeros(2, dtype=torch.long, device=META)
            prefix = PackPrefix(tensors, backbone.facts, visibility).of_rows(
                slots, backbone.dtype, Dropout(0.1, (1, 2))
            )
            nll = backbone.token_nll(batch, prefix)
            nll.sum().backward()
            assert nll.shape == (9,)
    assert all(leaf.grad is not None for leaf in tensors.values())


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_a_step_over_prefixes_of_different_lengths_and_depths_needs_nothing_of_the_host(
    kind: str,
) -> None:
    backbone = on_meta(with_window("gemma3", 4), kind)
    lengths = torch.zeros(2, dtype=torch.long, device=META)
    flags = torch.zeros(2, dtype=torch.bool, device=META)
    prefix = RowPrefix({}, lengths, infix=flags, windowed=flags, depths={"decoder": lengths})
    columns = torch.zeros((2, 1), dtype=torch.long, device=META)
    ids = torch.zeros((2, 1), dtype=torch.long, device=META)
    tokens = Tokens.of_slots(columns, lengths, 1, lengths)
    logits = backbone.step(ids, tokens, prefix, None, prompt_lengths=lengths)
    assert logits.shape == (2, backbone.facts.vocab_size)
