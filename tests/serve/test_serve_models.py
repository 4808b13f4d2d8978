"""Other models in the engine, and the engine against the library's generation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import (
    Listener,
    MakeRequest,
    expected_text,
    make_engine,
    make_held_prefix,
    prefix_file,
    save_llama,
    text_of,
)
from tiny_backbones import as_groups, as_layers
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
)

from ptuning.errors import UnsupportedModel
from ptuning.generation import generate
from ptuning.model.backbone import Backbone
from ptuning.model.load import load_backbone
from ptuning.prefix.artifact import Prefix, make_prefix
from ptuning.prefix.ready import make_ready
from serve.engine.engine import HeldPrefix, Request
from serve.engine.runner import SlotRunner
from serve.engine.slots import SlotLayer
from serve.events import PrefixInfo


def save_sliding(kind: str, directory: Path) -> Path:
    """Save a model whose layers have a window of 8 tokens: all (Mistral) or every second one
    (Gemma 3)."""
    save_llama(directory)  # for its tokenizer
    sizes: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    torch.manual_seed(1)
    if kind == "mistral":
        MistralForCausalLM(MistralConfig(**sizes)).save_pretrained(directory)
    else:
        kinds = ["sliding_attention", "full_attention"] * 2
        Gemma3ForCausalLM(Gemma3TextConfig(**sizes, layer_types=kinds)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_sliding_windows_equal_the_plain_model_beyond_the_window(
    tmp_path: Path, make_request: MakeRequest, kind: str
) -> None:
    path = save_sliding(kind, tmp_path)
    backbone = load_backbone(str(path), dtype="float32", attention="sdpa", device="cpu")
    made = [
        make_request("a text longer than the window of eight", prefix, max_tokens=12)
        for prefix in (None, make_held_prefix(backbone, 5, 1))
    ]
    wanted = [expected_text(backbone, request) for request, _ in made]
    engine = make_engine(backbone)
    try:
        for request, _ in made:
            engine.submit(request)
        assert [text_of(heard.wait()) for _, heard in made] == wanted
    finally:
        engine.close()


def test_a_model_that_answers_otherwise_with_slots_is_refused(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = SlotLayer.update

    def forget(layer: SlotLayer, keys: Tensor, values: Tensor, *rest: Any) -> Any:
        """A cache that mixes up its columns."""
        all_keys, all_values = update(layer, keys, values, *rest)
        return all_keys, all_values.roll(1, dims=2)

    monkeypatch.setattr(SlotLayer, "update", forget)
    with pytest.raises(UnsupportedModel, match="logits differ"):
        SlotRunner(backbone, 2)


def answer_with_engine(
    backbone: Backbone, prompts: Sequence[str], prefixes: Sequence[Prefix | None], tokens: int
) -> list[str]:
    """The engine's greedy answers, with all rows submitted at once and fewer slots than rows."""
    engine = make_engine(backbone)
    listeners = []
    try:
        for number, (prompt, prefix) in enumerate(zip(prompts, prefixes, strict=True)):
            listener = Listener.new()
            held = None
            if prefix is not None:
                info = PrefixInfo(name="default", version="1", digest=prefix.digest)
                held = HeldPrefix(info=info, ready=make_ready(prefix, backbone))
            engine.submit(
                Request(
                    id=f"r{number}",
                    prompt=tuple(backbone.template.encode_prompt(prompt)),
                    prefix=held,
                    max_tokens=tokens,
                    emit=listener.events.put,
                )
            )
            listeners.append(listener)
        return [text_of(listener.wait(120)) for listener in listeners]
    finally:
        engine.close()


def test_the_engine_generates_what_the_library_generates(backbone: Backbone) -> None:
    prompts = [f"question {n} " * (1 + n % 3) for n in range(7)]
    prefixes = [
        prefix_file(backbone, f"u{n}", length=1 + 3 * n, seed=n) if n % 3 else None
        for n in range(7)
    ]
    wanted = generate(backbone, prompts, prefixes, max_new_tokens=16)
    assert answer_with_engine(backbone, prompts, prefixes, 16) == wanted


@pytest.mark.slow
def test_the_engine_generates_what_the_library_generates_with_a_real_model() -> None:
    backbone = load_backbone("smollm2", dtype="float32", attention="sdpa", device="cpu")
    prompts = [f"Write a short note about {thing}." for thing in ("rain", "a dog", "tea", "jazz")]
    words = [None, "old letters from the sea", "a formal and dry report", None]
    prefixes: list[Prefix | None] = []
    for number, text in enumerate(words):
        if text is None:
            prefixes.append(None)
            continue
        ids = backbone.template.ids(text)
        kv, _ = backbone.capture(torch.tensor([ids]))
        meta = prefix_file(backbone, f"u{number}", length=len(ids)).meta
        prefixes.append(make_prefix([as_groups(as_layers(kv)[0])], meta))
    wanted = generate(backbone, prompts, prefixes, max_new_tokens=24)
    assert answer_with_engine(backbone, prompts, prefixes, 24) == wanted
    assert len(set(wanted)) == 4
