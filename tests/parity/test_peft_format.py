"""A prefix saved for PEFT is the same function there, and PEFT's own adapters are here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_model import make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ptuning import peft_format
from ptuning.artifact import ArtifactConfig, Prefix, PrefixMeta, make_prefix
from ptuning.attention import implementation
from ptuning.backbone import DECODER, Backbone
from ptuning.errors import (
    ArtifactError,
    CorruptArtifact,
    WrongBackbone,
    WrongMethod,
    WrongShape,
    WrongUser,
)
from ptuning.generate import row_prefix
from ptuning.methods.prefix import PrefixTuning
from ptuning.peft_format import CONFIG, OURS, TENSOR, WEIGHTS, load_peft, save_peft

torch.set_num_threads(1)
P = 5
VOCAB = len(make_tokenizer())
_GQA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_GQA),
    "qwen3": lambda: transformers.Qwen3Config(**_GQA, head_dim=16),  # H * D is not E
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=128
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GQA, head_dim=16, sliding_window=64),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
    ),
}
IDS = [5, 80, 33, 120, 7, 256, 41]


def model_for(config: PreTrainedConfig, attention: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter.data, std=0.7 / parameter.shape[-1] ** 0.5)
    return model.eval()


def backbone_for(family: str) -> Backbone:
    model = model_for(FAMILIES[family](), implementation("eager"))
    return Backbone(model, make_tokenizer(), name=f"tiny-{family}", fingerprint="f" * 64)


def prefix_for(backbone: Backbone, **changes: Any) -> Prefix:
    torch.manual_seed(1)
    dtype = changes.pop("dtype", "float32")
    meta = {
        "method": PrefixTuning(num_virtual_tokens=P).model_dump(),
        "backbone": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "template_digest": backbone.template.digest,
        "user_key": "k" * 52,
        "prefix_name": "work",
        "data_digest": "d" * 64,
        "training_digest": "t" * 64,
        **changes,
    }
    kv = torch.randn(backbone.facts.kv_shape(DECODER, P))
    return make_prefix({DECODER: kv}, PrefixMeta(**meta), ArtifactConfig(dtype=dtype))


def our_logits(backbone: Backbone, prefix: Prefix) -> Tensor:
    """`[T, V]`."""
    ids = torch.tensor([IDS])
    positions = torch.arange(len(IDS))[None] + prefix.num_virtual_tokens
    rows = []
    for length in range(1, len(IDS) + 1):
        rows.append(
            backbone.step(
                ids[:, :length],
                torch.ones_like(ids[:, :length]),
                positions[:, :length],
                row_prefix(backbone, [prefix]),
                transformers.DynamicCache(),
            )[0]
        )
    return torch.stack(rows)


def peft_logits(family: str, directory: Path) -> Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(model_for(FAMILIES[family](), "eager"), str(directory))
    ids = torch.tensor([IDS])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]


def peft_adapter(family: str, directory: Path, **options: Any) -> Any:
    """An adapter that PEFT itself made and saved."""
    from peft import PrefixTuningConfig, get_peft_model

    model = get_peft_model(
        model_for(FAMILIES[family](), "eager"),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **options),
    )
    torch.manual_seed(3)
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(str(directory))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_same_logits_from_what_we_save(family: str, tmp_path: Path) -> None:
    backbone = backbone_for(family)
    prefix = prefix_for(backbone)
    save_peft(prefix, tmp_path, backbone)
    expected = our_logits(backbone, prefix)
    ours = peft_logits(family, tmp_path)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        base = model_for(FAMILIES[family](), "eager")(input_ids=torch.tensor([IDS])).logits[0]
    assert (base - expected).abs().max() > 1e-2, "the prefix changed nothing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"prefix_projection": True, "encoder_hidden_size": 12}])
def test_we_compute_the_same_logits_from_what_peft_saves(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """With PEFT's projection too: it saves what the projection gives."""
    peft_adapter(family, tmp_path, **options)
    backbone = backbone_for(family)
    prefix = load_peft(tmp_path, backbone)
    assert prefix.num_virtual_tokens == P
    torch.testing.assert_close(
        our_logits(backbone, prefix), peft_logits(family, tmp_path), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_way_there_and_back_loses_nothing(tmp_path: Path, dtype: str) -> None:
    backbone = backbone_for("llama")
    prefix = prefix_for(backbone, dtype=dtype)
    assert save_peft(prefix, tmp_path / "new" / "folder", backbone) == tmp_path / "new" / "folder"
    again = load_peft(tmp_path / "new" / "folder", backbone, user_key="k" * 52, prefix_name="work")
    assert again.meta == prefix.meta
    assert again.digest == prefix.digest
    assert torch.equal(again.kv[DECODER], prefix.kv[DECODER])
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == sorted(
        [CONFIG, WEIGHTS, OURS]
    )


def test_an_adapter_of_peft_belongs_to_nobody_until_it_is_said_to_whom(tmp_path: Path) -> None:
    peft_adapter("llama", tmp_path)
    backbone = backbone_for("llama")
    prefix = load_peft(tmp_path, backbone)
    assert (prefix.meta.user_key, prefix.meta.prefix_name) == ("", "default")
    mine = load_peft(tmp_path, backbone, user_key="u" * 52, prefix_name="work")
    assert (mine.meta.user_key, mine.meta.prefix_name) == ("u" * 52, "work")
    again = Prefix.from_bytes(mine.to_bytes(), backbone, user_key="u" * 52)
    assert again.digest == mine.digest
    assert again.meta.method["imported_from"] == "peft"
    # And it can be handed back to PEFT.
    save_peft(mine, tmp_path / "back", backbone)
    torch.testing.assert_close(
        peft_logits("llama", tmp_path / "back"), peft_logits("llama", tmp_path)
    )


def test_a_prefix_of_another_backbone_or_user_is_refused(tmp_path: Path) -> None:
    backbone, other = backbone_for("llama"), backbone_for("gpt2")
    prefix = prefix_for(backbone)
    with pytest.raises(ArtifactError):
        save_peft(prefix, tmp_path / "x", other)
    assert not (tmp_path / "x").exists()
    save_peft(prefix, tmp_path, backbone)
    with pytest.raises(WrongShape) as caught:
        load_peft(tmp_path, other)
    assert caught.value.expected is not None
    same_shape = Backbone(backbone.model, backbone.tokenizer, name="another", fingerprint="0" * 64)
    with pytest.raises(WrongBackbone):
        load_peft(tmp_path, same_shape)
    with pytest.raises(WrongUser):
        load_peft(tmp_path, backbone, user_key="b" * 52)
    with pytest.raises(WrongUser):
        load_peft(tmp_path, backbone, prefix_name="default")


def test_weights_trained_further_in_peft_are_not_taken_for_the_old_prefix(tmp_path: Path) -> None:
    """Our own record beside them would otherwise claim a training that did not make them."""
    backbone = backbone_for("llama")
    save_peft(prefix_for(backbone), tmp_path, backbone)
    weights = load_file(tmp_path / WEIGHTS)
    save_file({TENSOR: weights[TENSOR] + 0.1}, tmp_path / WEIGHTS)
    with pytest.raises(CorruptArtifact) as caught:
        load_peft(tmp_path, backbone)
    assert OURS in (caught.value.fix or "")
    (tmp_path / OURS).unlink()
    assert load_peft(tmp_path, backbone).meta.user_key == ""


def _no_config(directory: Path) -> None:
    (directory / CONFIG).unlink()


def _config_is_no_json(directory: Path) -> None:
    (directory / CONFIG).write_text("{")


def _config_is_a_list(directory: Path) -> None:
    (directory / CONFIG).write_text("[]")


def _lora(directory: Path) -> None:
    (directory / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))


def _encoder_decoder(directory: Path) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | {"num_transformer_submodules": 2}))


def _no_weights(directory: Path) -> None:
    (directory / WEIGHTS).unlink()


def _pickled_weights(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    torch.save(tensors, directory / "adapter_model.bin")


def _cut_weights(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) // 2])


def _saved(change: Callable[[Tensor], dict[str, Tensor]]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = change(load_file(directory / WEIGHTS)[TENSOR])
        save_file({name: t.contiguous() for name, t in tensors.items()}, directory / WEIGHTS)

    return damage


def _not_finite(flat: Tensor) -> dict[str, Tensor]:
    return {TENSOR: torch.full_like(flat, float("nan"))}


def _ours_is_nonsense(directory: Path) -> None:
    (directory / OURS).write_text(json.dumps({"digest": 3}))


def _ours_has_more(directory: Path) -> None:
    record = json.loads((directory / OURS).read_text())
    record["meta"]["surprise"] = 1
    (directory / OURS).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (_no_config, CorruptArtifact),
        (_config_is_no_json, CorruptArtifact),
        (_config_is_a_list, CorruptArtifact),
        (_lora, WrongMethod),
        (_encoder_decoder, WrongMethod),
        (_no_weights, CorruptArtifact),
        (_pickled_weights, CorruptArtifact),
        (_cut_weights, CorruptArtifact),
        (_saved(lambda flat: {TENSOR: flat[:, :-1]}), WrongShape),
        (_saved(lambda flat: {TENSOR: flat[:0]}), WrongShape),
        (_saved(lambda flat: {TENSOR: flat[None]}), WrongShape),
        (_saved(lambda flat: {"prompt": flat}), WrongShape),
        (_saved(lambda flat: {TENSOR: flat, "more": flat.clone()}), WrongShape),
        (_saved(lambda flat: {TENSOR: flat.to(torch.int32)}), WrongShape),
        (_ours_is_nonsense, CorruptArtifact),
        (_ours_has_more, CorruptArtifact),
    ],
)
def test_a_directory_that_is_no_prefix_tuning_adapter_is_refused(
    damage: Callable[[Path], None], kind: type[ArtifactError], tmp_path: Path
) -> None:
    backbone = backbone_for("llama")
    save_peft(prefix_for(backbone), tmp_path, backbone)
    damage(tmp_path)
    with pytest.raises(kind) as caught:
        load_peft(tmp_path, backbone)
    assert type(caught.value) is kind
    assert caught.value.seen is not None


def test_values_of_peft_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    backbone = backbone_for("llama")
    peft_adapter("llama", tmp_path)
    _saved(_not_finite)(tmp_path)
    with pytest.raises(CorruptArtifact):
        load_peft(tmp_path, backbone)


def test_the_layout_is_pefts(tmp_path: Path) -> None:
    """Row p holds layer by layer the keys, then the values, head by head."""
    backbone = backbone_for("llama")
    prefix = prefix_for(backbone)
    flat = peft_format.flattened(prefix.kv[DECODER])
    assert flat.shape == (P, 3 * 2 * 2 * 8)
    layer, head, token = 2, 1, 3
    for which in (0, 1):
        at = ((layer * 2 + which) * 2 + head) * 8
        assert torch.equal(flat[token, at : at + 8], prefix.kv[DECODER][layer, which, head, token])
    assert torch.equal(peft_format.unflattened(flat, backbone), prefix.kv[DECODER])
    peft_adapter("llama", tmp_path)
    theirs = json.loads((tmp_path / CONFIG).read_text())
    save_peft(prefix, tmp_path / "ours", backbone)
    ours = json.loads((tmp_path / "ours" / CONFIG).read_text())
    for key in ("peft_type", "task_type", "num_layers", "num_attention_heads", "token_dim"):
        assert ours[key] == theirs[key]
    assert set(ours) <= set(theirs)
