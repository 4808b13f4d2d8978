"""A model's weight files, what its fingerprint depends on, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig

import ptuning
from ptuning.errors import ConfigError, ModelNotFound, UnsupportedModel
from ptuning.model import locate as locate_module
from ptuning.model.backbone import Backbone
from ptuning.model.devices import choose_attention, choose_dtype
from ptuning.model.facts import BackboneConfig
from ptuning.model.fingerprint import fingerprint_of, settings_text
from ptuning.model.load import model_class, read_config, weight_bytes
from ptuning.model.locate import locate_model, weight_files


@pytest.fixture
def directory(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def fingerprint(directory: Path) -> str:
    source = locate_model(str(directory))
    return fingerprint_of(source, read_config(source))


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shard(directory: Path) -> None:
    """Split the weights into two files and an index."""
    weights = load_file(directory / "model.safetensors")
    names = sorted(weights)
    files = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: weights[name] for name in names if files[name] == file}
        save_file(part, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()


def test_weights_that_are_not_loaded_count_for_nothing(directory: Path) -> None:
    """Mistral's repositories contain a consolidated.safetensors beside the shards."""
    source, config, before = (
        locate_model(str(directory)),
        read_config(locate_model(str(directory))),
        None,
    )
    for _ in range(2):
        now = fingerprint(directory), weight_bytes(source, config, torch.float32)
        assert before in (None, now)
        before = now
        shutil.copy(directory / "model.safetensors", directory / "consolidated.safetensors")


def test_shards_are_the_files_that_the_index_names(directory: Path) -> None:
    shard(directory)
    shutil.copy(
        directory / "model-00001-of-00002.safetensors", directory / "consolidated.safetensors"
    )
    assert [file.name for file in weight_files(directory)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    ptuning.load_backbone(str(directory), dtype="float32", device="cpu")
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="missing"):
        weight_files(directory)


def test_an_index_cannot_name_files_elsewhere(directory: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../other/model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound, match="outside"):
        weight_files(directory)


def test_a_download_takes_the_named_weights_only(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(directory)
    asked: list[list[str]] = []

    def snapshot_download(_name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    locate_model("owner/model")
    assert not any("safetensors" in pattern for pattern in asked[0])
    assert [pattern for pattern in asked[1] if "safetensors" in pattern] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"a_new_key": None},
        {"transformers_version": "9.0.0"},
        {"use_cache": False},
        {"architectures": None},
        {"attention_dropout": 0.1},
        {"pad_token_id": 7},
        {"attention_bias": False},
        {"_name_or_path": "/elsewhere"},
    ],
    ids=str,
)
def test_cosmetic_edits_of_the_configuration_keep_the_fingerprint(
    directory: Path, changes: dict[str, Any]
) -> None:
    """Every stored prefix of every user contains it."""
    before = fingerprint(directory)
    edit_config(directory, **changes)
    assert fingerprint(directory) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"decoder_start_token_id": 5},  # every answer of an encoder-decoder model begins with it
    ],
    ids=str,
)
def test_settings_that_change_an_answer_change_the_fingerprint(
    directory: Path, changes: dict[str, Any]
) -> None:
    before = fingerprint(directory)
    edit_config(directory, **changes)
    assert fingerprint(directory) != before


def test_a_changed_weight_changes_the_fingerprint_though_files_are_hashed_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path / "cache"))
    before = fingerprint(directory)
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    assert fingerprint(directory) != before


def test_an_old_file_is_hashed_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import os

    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path / "cache"))
    os.utime(directory / "model.safetensors", (1_000_000_000, 1_000_000_000))
    before = fingerprint(directory)
    monkeypatch.setattr(
        locate_module.hashlib, "file_digest", lambda *_: pytest.fail("the file was read again")
    )
    assert fingerprint(directory) == before


def test_the_settings_of_a_known_model_never_change_by_themselves() -> None:
    """If a new release of Transformers changes this, find out what it computes differently before
    you write new values: every stored prefix of such a model would be refused."""
    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    digest = hashlib.sha256(settings_text(config).encode()).hexdigest()
    assert digest == "58325f37e3dc026744ef3343e845537921a0e77f9c2984c5a05bdd7d09667015", (
        settings_text(config)
    )


def test_sdpa_is_not_chosen_for_models_that_cannot_do_it() -> None:
    gpu = torch.device("cuda")
    assert choose_attention("auto", gpu, model_class(LlamaConfig())) == "sdpa"
    assert choose_attention("auto", gpu, model_class(Gemma2Config())) == "eager"
    assert choose_attention("auto", torch.device("cpu"), model_class(LlamaConfig())) == "eager"


@pytest.mark.parametrize(("has_it", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_computes_in_bfloat16_where_it_can(
    has_it: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring would time only the kernel launch. It chose float32 on an H100."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_it)
    assert choose_dtype("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize(
    ("seconds", "dtype"),
    [((4.0, 1.0), torch.bfloat16), ((1.0, 1.0), torch.float32), ((1.0, 10.0), torch.float32)],
)
def test_a_cpu_computes_in_what_it_measures_as_faster(
    seconds: tuple[float, float], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = dict(zip((torch.float32, torch.bfloat16), seconds, strict=True))
    monkeypatch.setattr("ptuning.model.devices._probe", lambda kind, _device: taken[kind])
    assert choose_dtype("auto", torch.device("cpu")) == dtype


def test_a_model_with_custom_code_is_refused_without_a_prompt(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on standard input"))
    edit_config(directory, model_type="mine", auto_map={"AutoConfig": "mine.MyConfig"})
    (directory / "mine.py").write_text("raise SystemExit('code of a model was run')")
    with pytest.raises(UnsupportedModel, match="custom code") as caught:
        ptuning.load_backbone(str(directory), dtype="float32", device="cpu")
    assert "trust_remote_code" not in str(caught.value)


def test_a_loaded_model_is_a_backbone_too(directory: Path, backbone: Backbone) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    adopted = ptuning.load_backbone(model, tokenizer=tokenizer)
    rows = {"ann": [ptuning.Example(prompt=f"q {n}", completion=" tea") for n in range(9)]}
    options: dict[str, Any] = {
        "method": ptuning.PrefixTuning(num_virtual_tokens=2),
        "train": ptuning.TrainConfig(epochs=1),
    }
    first = ptuning.tune(adopted, rows, **options)["ann"]
    second = ptuning.tune(backbone, rows, **options)["ann"]
    assert first.history == second.history
    again = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert ptuning.load_backbone(again, tokenizer=tokenizer).fingerprint == adopted.fingerprint
    with pytest.raises(ConfigError, match="tokenizer"):
        ptuning.load_backbone(model)


def test_a_backbone_is_loaded_by_its_configuration(directory: Path) -> None:
    config = BackboneConfig(name=str(directory), dtype="bfloat16", device="cpu")
    assert ptuning.load_backbone(config).dtype == torch.bfloat16
    assert ptuning.load_backbone(config, dtype="float32").dtype == torch.float32
    with pytest.raises(ConfigError, match="no such setting"):
        ptuning.load_backbone(config, dtyp="float32")
