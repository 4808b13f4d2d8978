"""A prefix saved for PEFT computes the same in PEFT, and PEFT's adapters compute the same here."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import tiny_backbones
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_backbones import (
    EAGER_ONLY,
    SEQ2SEQ,
    as_layers,
    build,
    build_model,
    prefix_rows,
    random_ids,
)
from tiny_model import make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ptuning.errors import (
    ArtifactError,
    CorruptArtifact,
    WrongBackbone,
    WrongMethod,
    WrongShape,
    WrongUser,
)
from ptuning.methods.base import Method
from ptuning.methods.prefix import PrefixTuning
from ptuning.methods.prompt import PromptTuning
from ptuning.methods.ptuning import PTuning
from ptuning.model.attention import implementation
from ptuning.model.attention_plan import Tokens
from ptuning.model.backbone import Backbone
from ptuning.model.facts import DECODER, stack_of
from ptuning.prefix import peft_format
from ptuning.prefix.artifact import ArtifactConfig, Prefix, PrefixMeta, make_prefix
from ptuning.prefix.peft_format import CONFIG, OURS, TENSOR, WEIGHTS, load_peft, save_peft

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
# Qwen 3 and Gemma 3: H * D is not E.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    **tiny_backbones.FAMILIES,
    "llama": lambda: transformers.LlamaConfig(**_GQA),  # an odd number of layers
}
IDS = [5, 80, 33, 120, 7, 256, 41]
FRONT = f"{{p:{P}}}{{prompt}}{{completion}}"
# The methods that PEFT can hold, with PEFT's names.
METHODS: dict[str, tuple[Method, str]] = {
    "prefix": (PrefixTuning(num_virtual_tokens=P), "PREFIX_TUNING"),
    "embedding-only": (PrefixTuning(num_virtual_tokens=P, layers="embedding"), "PROMPT_TUNING"),
    "prompt": (PromptTuning(num_virtual_tokens=P), "PROMPT_TUNING"),
    "ptuning-mlp": (PTuning(template=FRONT), "P_TUNING"),
    "ptuning-lstm": (PTuning(template="{p:2}{p:3}{prompt}", encoder="lstm"), "P_TUNING"),
    "ptuning-none": (PTuning(template=FRONT, encoder="none"), "P_TUNING"),
}
methods = pytest.mark.parametrize("method", METHODS)


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


def prefix_for(backbone: Backbone, method: Method | None = None, **changes: Any) -> Prefix:
    """A random prefix of `method` (default: Prefix Tuning)."""
    torch.manual_seed(1)
    dtype = changes.pop("dtype", "float32")
    method = method or PrefixTuning(num_virtual_tokens=P)
    texts = {
        "user_key": "k" * 52,
        "prefix_name": "work",
        "data_digest": "d" * 64,
        "training_digest": "t" * 64,
        **changes,
    }
    members = [
        {name: torch.randn(shape) for name, shape in method.shapes(backbone.facts).items()}
        for _ in range(method.members)
    ]
    meta = PrefixMeta.of(backbone, method, **texts)
    return make_prefix(members, meta, ArtifactConfig(dtype=dtype))


def our_logits(backbone: Backbone, prefix: Prefix) -> Tensor:
    """`[T, V]`."""
    ids = torch.tensor([IDS])
    rows = []
    for length in range(1, len(IDS) + 1):
        rows.append(
            backbone.step(
                ids[:, :length],
                Tokens.of_mask(torch.ones_like(ids[:, :length]), length),
                prefix_rows(backbone, [prefix]),
                transformers.DynamicCache(),
            )[0]
        )
    return torch.stack(rows)


def peft_logits(family: str, directory: Path) -> Tensor:
    from peft import PeftModel

    return logits_in_peft(
        PeftModel.from_pretrained(model_for(FAMILIES[family](), "eager"), str(directory))
    )


def logits_in_peft(model: Any) -> Tensor:
    """Logits `[T, V]` of the real tokens, without those of virtual tokens at the input."""
    ids = torch.tensor([IDS])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(IDS) :]


def base_logits(family: str) -> Tensor:
    with torch.no_grad():
        return model_for(FAMILIES[family](), "eager")(input_ids=torch.tensor([IDS])).logits[0]


def peft_config(kind: str, **options: Any) -> Any:
    import peft

    made = {
        "PREFIX_TUNING": peft.PrefixTuningConfig,
        "PROMPT_TUNING": peft.PromptTuningConfig,
        "P_TUNING": peft.PromptEncoderConfig,
    }[kind]
    return made(**{"task_type": "CAUSAL_LM", "num_virtual_tokens": P, **options})


def peft_adapter(family: str, directory: Path, kind: str = "PREFIX_TUNING", **options: Any) -> Any:
    """Save an adapter made by PEFT."""
    from peft import get_peft_model

    base = model_for(FAMILIES[family](), "eager")
    return save_random_adapter(get_peft_model(base, peft_config(kind, **options)), directory)


def save_random_adapter(model: Any, directory: Path) -> Any:
    torch.manual_seed(3)
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(str(directory))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@methods
def test_peft_computes_the_same_logits_from_what_we_save(
    method: str, family: str, tmp_path: Path
) -> None:
    backbone, (made_by, kind) = backbone_for(family), METHODS[method]
    prefix = prefix_for(backbone, made_by)
    save_peft(prefix, tmp_path, backbone)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == kind
    expected = our_logits(backbone, prefix)
    ours = peft_logits(family, tmp_path)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert (base_logits(family) - expected).abs().max() > 1e-2, "the prefix changed nothing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PREFIX_TUNING", {}),
        ("PREFIX_TUNING", {"prefix_projection": True, "encoder_hidden_size": 12}),
        ("PROMPT_TUNING", {}),
        ("P_TUNING", {"encoder_hidden_size": 12}),
        ("P_TUNING", {"encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM"}),
    ],
    ids=["prefix", "prefix-mlp", "prompt", "ptuning-mlp", "ptuning-lstm"],
)
def test_we_compute_the_same_logits_from_what_peft_saves(
    family: str, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """With an encoder too: PEFT saves the encoder's output."""
    made = peft_adapter(family, tmp_path, kind, **options).eval()
    backbone = backbone_for(family)
    prefix = load_peft(tmp_path, backbone)
    assert prefix.num_virtual_tokens == P
    ours = our_logits(backbone, prefix)
    torch.testing.assert_close(ours, peft_logits(family, tmp_path), atol=1e-5, rtol=1e-5)
    # PEFT computes the same before saving, with its encoder.
    torch.testing.assert_close(ours, logits_in_peft(made), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_beyond_a_sliding_window_a_peft_prefix_is_computed_as_in_peft(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefix of ours that stays visible computes something else there, and only there."""
    window = 6  # shorter than P and the text together
    narrow: dict[str, Callable[[], PreTrainedConfig]] = {
        "gemma3": lambda: transformers.Gemma3TextConfig(**_GQA, head_dim=16, sliding_window=window),
        "mistral": lambda: transformers.MistralConfig(**_GQA, sliding_window=window),
    }
    monkeypatch.setitem(FAMILIES, family, narrow[family])
    backbone = backbone_for(family)
    peft_adapter(family, tmp_path, kind)
    theirs = peft_logits(family, tmp_path)
    adopted = load_peft(tmp_path, backbone)
    torch.testing.assert_close(our_logits(backbone, adopted), theirs, atol=1e-5, rtol=1e-5)
    if kind == "PREFIX_TUNING":
        always = prefix_for(backbone)
        with pytest.warns(UserWarning, match=f"beyond {window} tokens.*sliding_window=respect"):
            save_peft(always, tmp_path / "always", backbone)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_peft(adopted, tmp_path / "window", backbone)
        there, here = peft_logits(family, tmp_path / "always"), our_logits(backbone, always)
        torch.testing.assert_close(there[: window - P], here[: window - P], atol=1e-5, rtol=1e-5)
        assert (there[-1] - here[-1]).abs().max() > 1e-2


_PAIR: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": None,
}  # fmt: skip


def m2m100() -> PreTrainedConfig:
    return transformers.M2M100Config(**_PAIR)


def short(family: str) -> PreTrainedConfig:
    """T5's maximum distance is shorter than the answer."""
    config = config_with_one_table(family)
    if hasattr(config, "relative_attention_max_distance"):
        config.relative_attention_num_buckets, config.relative_attention_max_distance = 6, 7
    return config


# BART's encoder has more layers than its decoder, and PEFT has keys and values for each of them.
PEFT_PAIRS: dict[str, Callable[[], PreTrainedConfig]] = {
    **{family: partial(short, family) for family in ("t5", "t5_gated", "bart")},
    "marian": lambda: transformers.MarianConfig(**_PAIR),
    "t5gemma": EAGER_ONLY["t5gemma"],
}


def config_with_one_table(family: str) -> PreTrainedConfig:
    """A configuration whose stacks share one embedding table. PEFT uses the first table it finds,
    so with another in the encoder (BART with `tie_word_embeddings=False`) PEFT's model would
    differ from the loaded model."""
    config = (SEQ2SEQ | EAGER_ONLY)[family]()
    config.tie_word_embeddings = config.tie_word_embeddings or family == "bart"
    return config


def settings_that_peft_lacks(family: str, kind: str) -> dict[str, Any]:
    """The settings that PEFT does not find in a nested configuration and a user must pass."""
    if family != "t5gemma":
        return {}
    heads, width = (2, 16) if kind == "PREFIX_TUNING" else (4, 32)
    return {"num_layers": 2, "num_attention_heads": heads, "token_dim": width}


@pytest.mark.parametrize("family", ["t5", "t5_gated", "bart", "t5gemma"])
@pytest.mark.parametrize("method", ["prompt", "ptuning-mlp"])
@pytest.mark.parametrize("copies", [None, 1])
def test_an_encoder_decoder_models_prompt_converts_both_ways(
    method: str, family: str, copies: int | None, tmp_path: Path
) -> None:
    """By default PEFT stores 2 P rows for such a model and reads the first P."""
    from peft import PeftModel, get_peft_model

    backbone, (made_by, kind) = build(config_with_one_table(family)), METHODS[method]
    begin = backbone.facts.decoder_start_id
    ids, answer = torch.tensor([IDS]), torch.tensor([[begin, 9, 77]])

    def compute_here(prefix: Prefix) -> Tensor:
        rows = prefix_rows(backbone, [prefix])
        arranged = torch.tensor([prefix.arrangement(backbone.template).prompt(IDS)])
        mask = torch.ones_like(arranged)
        encoded = backbone.encode_source(arranged, mask, rows)
        return backbone.answer_step(encoded, mask, answer, rows, torch.tensor([2]))[0]

    def compute_in_peft(directory: Path) -> Tensor:
        model = PeftModel.from_pretrained(
            build_model(config_with_one_table(family), "eager"), str(directory)
        )
        with torch.no_grad():
            return model(
                input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=answer
            ).logits[0, -1]

    prefix = prefix_for(backbone, made_by)
    save_peft(prefix, tmp_path / "ours", backbone)
    torch.testing.assert_close(
        compute_in_peft(tmp_path / "ours"), compute_here(prefix), atol=1e-5, rtol=1e-5
    )
    assert load_peft(tmp_path / "ours", backbone).digest == prefix.digest
    config = peft_config(
        kind,
        task_type="SEQ_2_SEQ_LM",
        num_transformer_submodules=copies,
        **({"encoder_hidden_size": 8} if kind == "P_TUNING" else {}),
        **settings_that_peft_lacks(family, kind),
    )
    model = get_peft_model(build_model(config_with_one_table(family), "eager"), config)
    save_random_adapter(model, tmp_path / "theirs")
    adopted = load_peft(tmp_path / "theirs", backbone)
    assert adopted.num_virtual_tokens == P
    torch.testing.assert_close(
        compute_here(adopted), compute_in_peft(tmp_path / "theirs"), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", PEFT_PAIRS)
@pytest.mark.parametrize("projection", [False, True], ids=["direct", "mlp"])
def test_an_encoder_decoder_models_keys_and_values_convert_both_ways(
    family: str, projection: bool, tmp_path: Path
) -> None:
    """PEFT passes them to the decoder's self-attention as a cache, and the answer's positions come
    after it. The answer is longer than T5's maximum distance."""
    from peft import PeftModel, get_peft_model

    backbone = build(PEFT_PAIRS[family]())
    begin = backbone.facts.decoder_start_id
    prompt, answer = random_ids(11, 1), torch.tensor([[begin, *random_ids(8, 2)]])
    ids = torch.tensor([prompt])

    def compute_here(prefix: Prefix) -> Tensor:
        """Logits `[S, V]`, in a batch with a row of another length without a prefix."""
        rows, mask = torch.cat([ids, ids]), torch.ones_like(ids).repeat(2, 1)
        own = prefix_rows(backbone, [prefix, None])
        states = backbone.encode_source(rows, mask, own)
        logits = [
            backbone.answer_step(states, mask, answer.repeat(2, 1), own, torch.tensor([n, 0]))[0]
            for n in range(answer.shape[1])
        ]
        return torch.stack(logits)

    def compute_in_peft(model: Any) -> Tensor:
        with torch.no_grad():
            mask = torch.ones_like(ids)
            output = model(input_ids=ids, attention_mask=mask, decoder_input_ids=answer)
            return output.logits[0]

    def load(directory: Path) -> Any:
        return PeftModel.from_pretrained(build_model(PEFT_PAIRS[family](), "eager"), str(directory))

    window: Any = (
        "respect" if family == "t5gemma" else "ignore"
    )  # a sliding window hides PEFT's prefix
    method = PrefixTuning(num_virtual_tokens=P, stacks=("decoder",), sliding_window=window)
    prefix = prefix_for(backbone, method)
    save_peft(prefix, tmp_path / "ours", backbone)
    expected = compute_here(prefix)
    torch.testing.assert_close(
        compute_in_peft(load(tmp_path / "ours")), expected, atol=1e-5, rtol=1e-5
    )
    plain = compute_in_peft(build_model(PEFT_PAIRS[family](), "eager"))
    assert (plain - expected).abs().max() > 1e-2, "the prefix changed nothing"
    assert load_peft(tmp_path / "ours", backbone).digest == prefix.digest

    config = peft_config(
        "PREFIX_TUNING",
        task_type="SEQ_2_SEQ_LM",
        prefix_projection=projection,
        **({"encoder_hidden_size": 12} if projection else {}),
        **settings_that_peft_lacks(family, "PREFIX_TUNING"),
    )
    model = get_peft_model(build_model(PEFT_PAIRS[family](), "eager"), config)
    save_random_adapter(model, tmp_path / "theirs")
    adopted = load_peft(tmp_path / "theirs", backbone)
    assert {stack_of(name) for name in adopted.tensors} == {DECODER}
    assert adopted.num_virtual_tokens == P
    for theirs in (model.eval(), load(tmp_path / "theirs")):
        torch.testing.assert_close(
            compute_here(adopted), compute_in_peft(theirs), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(("copies", "refused"), [(None, False), (2, False), (1, True), (3, True)])
def test_a_peft_cache_for_one_or_three_stacks_of_an_encoder_decoder_model_is_refused(
    copies: int | None, refused: bool, tmp_path: Path
) -> None:
    """With such a number PEFT itself would build another cache. By default it is for two stacks."""
    backbone = build(PEFT_PAIRS["bart"]())
    prefix = prefix_for(backbone, PrefixTuning(num_virtual_tokens=P, stacks=("decoder",)))
    save_peft(prefix, tmp_path, backbone)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_transformer_submodules": copies}))
    if refused:
        with pytest.raises(WrongMethod, match=f"num_transformer_submodules {copies}"):
            load_peft(tmp_path, backbone)
    else:
        assert load_peft(tmp_path, backbone).digest == prefix.digest


def test_a_decoder_that_computes_its_own_positions_is_refused(tmp_path: Path) -> None:
    from peft import get_peft_model

    backbone, model = build(m2m100()), build_model(m2m100(), "eager")
    config = peft_config("PREFIX_TUNING", task_type="SEQ_2_SEQ_LM")
    save_random_adapter(get_peft_model(model, config), tmp_path)
    with pytest.raises(WrongMethod) as caught:
        load_peft(tmp_path, backbone)
    assert "PROMPT_TUNING" in str(caught.value.expected)
    with pytest.raises(WrongMethod, match="computes its own positions"):
        save_peft(
            prefix_for(backbone, PrefixTuning(num_virtual_tokens=P, stacks=("decoder",))),
            tmp_path / "x",
            backbone,
        )


# What PEFT cannot hold, and the setting that the error names.
BEYOND: dict[str, tuple[Method, str, str]] = {
    "infix": (PrefixTuning(num_virtual_tokens=P, placement="infix"), "infix", "placement=prefix"),
    "top-layers": (PrefixTuning(num_virtual_tokens=P, layers=2), "layers=2", "layers=all"),
    "infix-embedding": (
        PrefixTuning(num_virtual_tokens=P, placement="infix", layers="embedding"),
        "{prompt}{p:5}",
        "template",
    ),
    "ensemble": (PromptTuning(num_virtual_tokens=P, ensemble=2), "ensemble=2", "ensemble=1"),
    "inner": (PTuning(template="{p:2}{prompt}{p:3}"), "{prompt}{p:3}", "template"),
    "behind": (PTuning(template="{prompt}{p:5}"), "{prompt}{p:5}", "template"),
    "anchors": (PTuning(template="{p:5} so {prompt}"), " so ", "template"),
    "anchors-behind": (PTuning(template="{p:5}{prompt} so "), " so ", "template"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_a_method_that_peft_cannot_hold_is_refused(case: str, tmp_path: Path) -> None:
    method, seen, fix = BEYOND[case]
    backbone = backbone_for("llama")
    with pytest.raises(WrongMethod) as caught:
        save_peft(prefix_for(backbone, method), tmp_path / "x", backbone)
    assert seen in str(caught.value.seen)
    assert caught.value.expected is not None
    assert fix in (caught.value.fix or "")
    assert not (tmp_path / "x").exists()


def test_a_prefix_beyond_a_decoders_self_attention_is_refused(tmp_path: Path) -> None:
    backbone = build(SEQ2SEQ["bart"]())
    for method in (
        PrefixTuning(num_virtual_tokens=P),
        PrefixTuning(num_virtual_tokens=P, stacks=("encoder",)),
        PrefixTuning(num_virtual_tokens=P, stacks=("decoder", "cross")),
    ):
        prefix = prefix_for(backbone, method)
        with pytest.raises(WrongMethod) as caught:
            save_peft(prefix, tmp_path / "x", backbone)
        assert "method.stacks=[decoder]" in (caught.value.fix or "")
        assert not (tmp_path / "x").exists()


def test_all_layers_by_number_are_all_layers(tmp_path: Path) -> None:
    backbone = backbone_for("llama")
    prefix = prefix_for(backbone, PrefixTuning(num_virtual_tokens=P, layers=3))
    save_peft(prefix, tmp_path, backbone)
    assert load_peft(tmp_path, backbone).digest == prefix.digest


@methods
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_saving_for_peft_and_loading_again_loses_nothing(
    tmp_path: Path, dtype: str, method: str
) -> None:
    backbone = backbone_for("llama")
    prefix = prefix_for(backbone, METHODS[method][0], dtype=dtype)
    assert save_peft(prefix, tmp_path / "new" / "folder", backbone) == tmp_path / "new" / "folder"
    again = load_peft(tmp_path / "new" / "folder", backbone, user_key="k" * 52, prefix_name="work")
    assert again.meta == prefix.meta
    assert again.digest == prefix.digest
    for ours, theirs in zip(again.members, prefix.members, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == sorted(
        [CONFIG, WEIGHTS, OURS]
    )


@pytest.mark.parametrize(
    ("kind", "type_"),
    [("PREFIX_TUNING", "prefix"), ("PROMPT_TUNING", "prompt"), ("P_TUNING", "ptuning")],
)
def test_a_peft_adapter_has_no_user_until_one_is_given(
    kind: str, type_: str, tmp_path: Path
) -> None:
    peft_adapter("llama", tmp_path, kind, **({"encoder_hidden_size": 8} if kind[1] == "_" else {}))
    backbone = backbone_for("llama")
    prefix = load_peft(tmp_path, backbone)
    assert (prefix.meta.user_key, prefix.meta.prefix_name) == ("", "default")
    mine = load_peft(tmp_path, backbone, user_key="u" * 52, prefix_name="work")
    assert (mine.meta.user_key, mine.meta.prefix_name) == ("u" * 52, "work")
    again = Prefix.from_bytes(mine.to_bytes(), backbone, user_key="u" * 52)
    assert again.digest == mine.digest
    assert again.meta.imported_from == "peft"
    assert again.method.type == type_
    # It can be saved for PEFT again.
    save_peft(mine, tmp_path / "back", backbone)
    assert json.loads((tmp_path / "back" / CONFIG).read_text())["peft_type"] == kind
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
    """Otherwise our metadata beside them would name a training that did not produce them."""
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


def _change_config(**changes: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(config | changes))

    return damage


def _no_weights(directory: Path) -> None:
    (directory / WEIGHTS).unlink()


def _pickled_weights(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    torch.save(tensors, directory / "adapter_model.bin")


def _cut_weights(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) // 2])


def _rewrite_weights(change: Callable[[Tensor], dict[str, Tensor]]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = change(load_file(directory / WEIGHTS)[TENSOR])
        save_file({name: t.contiguous() for name, t in tensors.items()}, directory / WEIGHTS)

    return damage


def _not_finite(flat: Tensor) -> dict[str, Tensor]:
    return {TENSOR: torch.full_like(flat, float("nan"))}


def _ours_is_nonsense(directory: Path) -> None:
    (directory / OURS).write_text(json.dumps({"digest": 3}))


def _ours_has_a_list_of_methods(directory: Path) -> None:
    record = json.loads((directory / OURS).read_text())
    record["meta"]["method"] = ["prefix"]
    (directory / OURS).write_text(json.dumps(record))


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
        (_change_config(peft_type="MULTITASK_PROMPT_TUNING"), WrongMethod),
        (_change_config(num_transformer_submodules=2), WrongMethod),
        (_change_config(task_type="SEQ_2_SEQ_LM"), WrongMethod),
        (_change_config(task_type="SEQ_CLS"), WrongMethod),
        (_change_config(num_virtual_tokens=P - 1), WrongShape),
        (_change_config(num_virtual_tokens=None), WrongShape),
        (_change_config(num_virtual_tokens=True), WrongShape),
        (_change_config(num_virtual_tokens=1001), WrongMethod),
        (_change_config(num_transformer_submodules=True), WrongMethod),
        (_change_config(num_transformer_submodules=0), WrongMethod),
        (_change_config(num_transformer_submodules="1"), WrongMethod),
        (_no_weights, CorruptArtifact),
        (_pickled_weights, CorruptArtifact),
        (_cut_weights, CorruptArtifact),
        (_rewrite_weights(lambda flat: {TENSOR: flat[:, :-1]}), WrongShape),
        (_rewrite_weights(lambda flat: {TENSOR: flat[:0]}), WrongShape),
        (_rewrite_weights(lambda flat: {TENSOR: flat[None]}), WrongShape),
        (_rewrite_weights(lambda flat: {"prompt": flat}), WrongShape),
        (_rewrite_weights(lambda flat: {TENSOR: flat, "more": flat.clone()}), WrongShape),
        (_rewrite_weights(lambda flat: {TENSOR: flat.to(torch.int32)}), WrongShape),
        (_ours_is_nonsense, CorruptArtifact),
        (_ours_has_more, CorruptArtifact),
        (_ours_has_a_list_of_methods, CorruptArtifact),
    ],
)
@pytest.mark.parametrize("method", ["prefix", "prompt", "ptuning-mlp"])
def test_a_directory_that_is_no_adapter_of_ours_is_refused(
    damage: Callable[[Path], None], kind: type[ArtifactError], method: str, tmp_path: Path
) -> None:
    backbone = backbone_for("llama")
    save_peft(prefix_for(backbone, METHODS[method][0]), tmp_path, backbone)
    damage(tmp_path)
    with pytest.raises(kind) as caught:
        load_peft(tmp_path, backbone)
    assert type(caught.value) is kind
    for said in (caught.value.seen, caught.value.expected, caught.value.fix):
        assert said is not None


@pytest.mark.parametrize(
    "said",
    [
        {"num_layers": 4, "num_attention_heads": 1, "token_dim": 8},  # as many columns
        {"num_layers": 0},
        {"num_layers": "2"},
        {"num_attention_heads": 1},
        {"token_dim": 16.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_an_adapter_whose_configuration_describes_another_model_is_refused(
    said: dict[str, Any], family: str, tmp_path: Path
) -> None:
    pairs = family in PEFT_PAIRS
    backbone = build(PEFT_PAIRS[family]()) if pairs else backbone_for(family)
    method = PrefixTuning(num_virtual_tokens=P, stacks=("decoder",) if pairs else None)
    save_peft(prefix_for(backbone, method), tmp_path, backbone)
    (tmp_path / OURS).unlink()
    assert load_peft(tmp_path, backbone).num_virtual_tokens == P
    _change_config(**said)(tmp_path)
    with pytest.raises(WrongShape, match="|".join(said)):
        load_peft(tmp_path, backbone)


def test_values_of_peft_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    backbone = backbone_for("llama")
    peft_adapter("llama", tmp_path)
    _rewrite_weights(_not_finite)(tmp_path)
    with pytest.raises(CorruptArtifact):
        load_peft(tmp_path, backbone)


@pytest.mark.parametrize("method", ["prefix", "prompt", "ptuning-mlp"])
def test_an_adapter_is_not_read_as_another_method(method: str, tmp_path: Path) -> None:
    """Where widths differ, the shape tells. Otherwise only our metadata does."""
    backbone = backbone_for("llama")
    save_peft(prefix_for(backbone, METHODS[method][0]), tmp_path, backbone)
    _change_config(peft_type="PROMPT_TUNING" if method == "prefix" else "PREFIX_TUNING")(tmp_path)
    with pytest.raises(WrongShape):
        load_peft(tmp_path, backbone)


def test_saved_keys_and_values_have_pefts_layout(tmp_path: Path) -> None:
    """Row p holds, for each layer, the keys and then the values of all heads."""
    backbone = backbone_for("llama")
    prefix = prefix_for(backbone)
    layers = as_layers(prefix.tensors)
    flat = peft_format.flatten_layers(layers)
    assert flat.shape == (P, 3 * 2 * 2 * 8)
    layer, head, token = 2, 1, 3
    for which in (0, 1):
        at = ((layer * 2 + which) * 2 + head) * 8
        assert torch.equal(flat[token, at : at + 8], layers[layer, which, head, token])
    assert torch.equal(peft_format.unflatten_layers(flat, backbone), layers)
    peft_adapter("llama", tmp_path)
    theirs = json.loads((tmp_path / CONFIG).read_text())
    save_peft(prefix, tmp_path / "ours", backbone)
    ours = json.loads((tmp_path / "ours" / CONFIG).read_text())
    for key in ("peft_type", "task_type", "num_layers", "num_attention_heads", "token_dim"):
        assert ours[key] == theirs[key]
    assert set(ours) <= set(theirs)
