"""A row depends on no other row of its batch. Models that couple rows, by whatever mechanism, are
refused or limited in length when they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_backbones import (
    VOCAB,
    build,
    build_model,
    logits_of,
    random_ids,
    random_prefix,
    user_rows,
)
from tiny_model import make_tokenizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ptuning import generation
from ptuning.errors import DataError, UnsupportedModel
from ptuning.generation import generate
from ptuning.methods.prefix import PrefixTuning
from ptuning.model import backbone as backbone_module
from ptuning.model import probe as probe_module
from ptuning.model.attention import implementation
from ptuning.model.backbone import Backbone
from ptuning.model.load import load_backbone
from ptuning.model.probe import Isolation, check_isolation, probe_isolation
from ptuning.scoring import nll
from ptuning.train.config import TrainConfig
from ptuning.train.packed import train_pack
from ptuning.train.step import LocalDriver
from ptuning.types import Example

ORIGINAL, POSITIONS = 48, 256
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rope(kind: str) -> dict[str, Any]:
    """Settings of a rope type, with an original length if the type has one."""
    settings: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind in ("yarn", "longrope", "llama3"):
        settings["original_max_position_embeddings"] = ORIGINAL
    if kind == "longrope":
        settings |= {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    if kind == "llama3":
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "proportional":
        settings["partial_rotary_factor"] = 0.5
    return settings


def with_rope(kind: str) -> PreTrainedConfig:
    return LlamaConfig(**_SIZES, rope_parameters=rope(kind))


def phi3_longrope() -> PreTrainedConfig:
    return transformers.Phi3Config(
        **_SIZES, original_max_position_embeddings=ORIGINAL, rope_parameters=rope("longrope")
    )


@pytest.mark.parametrize("kind", ["default", *ROPE_INIT_FUNCTIONS])
def test_every_rope_type_keeps_rows_apart_at_all_positions_that_are_left_to_it(kind: str) -> None:
    """All rope types of the installed Transformers, including types that it adds later."""
    config = with_rope(kind)
    if kind == "default":
        config = LlamaConfig(**_SIZES)
    backbone = build(config)
    limit = backbone.facts.max_positions
    assert limit == (ORIGINAL if kind == "longrope" else POSITIONS)
    short, long = random_ids(6, 1), random_ids(limit, 2)
    alone = compute_logits(backbone, [short])[0]
    beside = compute_logits(backbone, [short, long])[0]
    after = compute_logits(backbone, [short])[0]
    torch.testing.assert_close(beside, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after, alone, atol=1e-4, rtol=1e-4)


def compute_logits(backbone: Backbone, rows: list[list[int]]) -> list[Tensor]:
    with torch.no_grad():
        return logits_of(backbone, rows, None)


@pytest.mark.parametrize("config", [phi3_longrope, lambda: with_rope("dynamic")])
def test_beyond_the_cap_a_rope_couples_rows_in_the_plain_model(config: Any) -> None:
    """The reason for the cap: beyond it a row's logits depend on its neighbours."""
    model = build_model(config(), "eager")
    ids = torch.tensor([random_ids(6, 1), random_ids(6, 2)])
    longer = torch.tensor([[*random_ids(6, 1), *[0] * 294], random_ids(300, 3)])
    with torch.no_grad():
        alone = model(input_ids=ids).logits[0]
        beside = model(input_ids=longer).logits[0, :6]
    assert (alone - beside).abs().max() > 0.01


def test_a_long_neighbour_changes_neither_answer_nor_loss_of_a_longrope_model() -> None:
    backbone = build(phi3_longrope())
    prefix = random_prefix(backbone, PrefixTuning(num_virtual_tokens=4), 1)
    prompts = ["hi there", "what is it? " * 3]
    alone = generate(backbone, prompts[:1], [prefix], max_new_tokens=6)
    assert generate(backbone, prompts, [prefix, None], max_new_tokens=6)[:1] == alone
    with pytest.raises(DataError, match="too few positions"):
        generate(backbone, ["what is it? " * 30], [None], max_new_tokens=6)
    assert generate(backbone, prompts[:1], [prefix], max_new_tokens=6) == alone
    short = Example(prompt="hi", completion="there")
    loss = nll(backbone, [short], prefix)
    with pytest.raises(DataError, match="more positions than the backbone has"):
        nll(backbone, [short, Example(prompt="what is it? " * 30, completion="it")], prefix)
    assert nll(backbone, [short], prefix) == pytest.approx(loss, abs=1e-6)


def test_training_beside_a_user_of_long_rows_is_training_alone_in_a_longrope_model() -> None:
    """Bob's rows beyond the original length are left out with a reason. His other rows are
    shorter."""
    backbone = build(phi3_longrope())
    method = PrefixTuning(num_virtual_tokens=4, init="random")
    config = TrainConfig(epochs=2, batch_size=4, learning_rate=2e-2, patience=None)
    alice, bob = user_rows("alice", 4, 2), user_rows("bob", 4, 2, longest=44)

    def trained(pack: list[Any]) -> Any:
        return LocalDriver(backbone).run(train_pack(backbone, method, config, pack))[0].members

    (alone,), (beside,) = trained([alice]), trained([alice, bob])
    for name, values in alone.items():
        torch.testing.assert_close(beside[name], values, atol=5e-4, rtol=0)


class BatchStatistics(LlamaForCausalLM):
    """Normalises over the batch, also in evaluation."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm_of_all = nn.BatchNorm1d(config.hidden_size, track_running_stats=False)
        self.model.norm.register_forward_hook(
            lambda _m, _i, out: self.norm_of_all(out.transpose(1, 2)).transpose(1, 2)
        )


class Planted(LlamaForCausalLM):
    """Adds a little of the batch's longest row to every row."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda _m, _i, out: out + 0.01 * out.mean((0, 1)))


class Remembering(LlamaForCausalLM):
    """Adds a little of the previous batch."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.before: Tensor | float = 0.0
        self.model.norm.register_forward_hook(self._add)

    def _add(self, _module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        added, self.before = out + self.before, 0.01 * float(out.abs().max())
        return added


@pytest.mark.parametrize("kind", [BatchStatistics, Planted, Remembering])
def test_a_model_that_couples_rows_is_refused_with_what_it_did(kind: Any) -> None:
    config = LlamaConfig(**_SIZES)
    config._attn_implementation = implementation("eager")
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModel, match="rows of a batch are not isolated") as caught:
        Backbone(kind(config), make_tokenizer(), name="tiny", fingerprint="0" * 64)
    assert "logits differ by" in str(caught.value.seen)
    assert "another backbone" in str(caught.value.fix)


def test_experts_that_take_a_limited_number_of_a_batchs_tokens_couple_rows() -> None:
    def experts(**settings: Any) -> Any:
        config = transformers.NllbMoeConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_sparse_step=1,
            decoder_sparse_step=1,
            num_experts=2,
            max_position_embeddings=128,
            decoder_start_token_id=2,
            **settings,
            **{name: _SIZES[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        )
        return build_model(config, "eager")

    limited = probe_isolation(experts(expert_capacity=64, moe_eval_capacity_token_fraction=-1.0))
    assert limited.coupling is not None
    assert probe_isolation(experts(moe_eval_capacity_token_fraction=1.0)) == Isolation()


def test_a_verdict_is_reached_once_and_kept_by_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTUNING_CACHE", str(tmp_path))
    monkeypatch.setattr(probe_module, "_known", {})
    probed: list[Any] = []

    def count(model: Any) -> Isolation:
        probed.append(model)
        return probe_isolation(model)

    monkeypatch.setattr(probe_module, "probe_isolation", count)
    longrope, plain = build_model(phi3_longrope(), "eager"), build_model(with_rope("yarn"), "eager")
    assert check_isolation(longrope) == check_isolation(longrope) == Isolation(positions=ORIGINAL)
    assert check_isolation(plain) == Isolation()
    assert len(probed) == 2
    monkeypatch.setattr(probe_module, "_known", {})  # another process
    assert check_isolation(longrope) == Isolation(positions=ORIGINAL)
    assert len(probed) == 2
    for file in (tmp_path / "isolation").iterdir():  # truncated: probed again
        file.write_text("{")
    monkeypatch.setattr(probe_module, "_known", {})
    assert check_isolation(longrope) == Isolation(positions=ORIGINAL)
    assert len(probed) == 3


def test_a_backbone_loaded_from_files_is_capped_too(tmp_path: Path) -> None:
    build_model(phi3_longrope(), "eager").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), dtype="float32", device="cpu")
    assert backbone.facts.max_positions == ORIGINAL


def test_generating_n_tokens_calls_the_model_n_times(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    step = backbone.step

    def count(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return step(*args, **kwargs)

    monkeypatch.setattr(backbone, "step", count)
    monkeypatch.setattr(generation, "stop_ids", lambda _backbone: set())
    for tokens in (1, 4):
        calls = 0
        generate(backbone, ["hello", "there you are"], [None, None], max_new_tokens=tokens)
        assert calls == tokens


def test_a_checksum_sees_any_change_and_reads_large_tensors_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = build(LlamaConfig(**_SIZES))
    whole = backbone.checksum()
    monkeypatch.setattr(backbone_module, "_CHUNK", 8)
    with LargestOutput() as largest:
        assert backbone.checksum() == whole
    assert largest.nbytes <= 8 * 8
    inside: Any = backbone.model
    weight = inside.model.embed_tokens.weight
    weight.data[-1, -1] += 1e-3
    assert backbone.checksum() != whole
    weight.data[-1, -1] -= 1e-3
    weight.data[[3, 4]] = weight.data[[4, 3]]
    assert backbone.checksum() != whole


class LargestOutput(TorchDispatchMode):
    """Records the bytes of the largest tensor that an operation creates, except views."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            inputs = [one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)]
            if output.untyped_storage().data_ptr() not in inputs:
                self.nbytes = max(self.nbytes, output.untyped_storage().nbytes())
        return output


def test_the_vocabulary_is_what_the_input_embedding_has_rows_for() -> None:
    """Not the configuration's vocab_size: the table may be padded, and an id beyond it fails."""
    model = build_model(LlamaConfig(**_SIZES), implementation("eager"))
    model.set_input_embeddings(nn.Embedding(VOCAB + 12, 32))
    backbone = Backbone(model, make_tokenizer(), name="tiny", fingerprint="0" * 64)
    assert backbone.facts.vocab_size == VOCAB + 12
