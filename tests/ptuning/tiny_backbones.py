"""Tiny random backbones of many families, and inputs for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from tiny_model import make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from ptuning.data.encode import IGNORE, Encoded
from ptuning.methods.base import Method
from ptuning.model.attention import implementation
from ptuning.model.backbone import Backbone
from ptuning.model.batch import EMBEDDINGS, Batch, PackPrefix, RowPrefix
from ptuning.model.facts import DECODER, keys_name, values_name
from ptuning.prefix.artifact import Prefix, PrefixMeta, make_prefix
from ptuning.prefix.ready import make_ready, rows_of
from ptuning.train.config import UserRows
from ptuning.types import seed_of

VOCAB = len(make_tokenizer())
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    **_SPECIAL,
}


def _more(**settings: Any) -> dict[str, Any]:
    """Settings that a configuration accepts as keyword arguments."""
    return settings


_GQA: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    **_SPECIAL,
}

# Every family with both kinds of attention; windows are longer than most tests' texts.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_GQA),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2),
    "mistral": lambda: transformers.MistralConfig(**_GQA, sliding_window=64),
    "qwen3": lambda: transformers.Qwen3Config(**_GQA, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_GQA,
        head_dim=16,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        **_SPECIAL,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_COMMON),
    "phi3": lambda: transformers.Phi3Config(**_GQA),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(**_GPT2),  # one key-value head
    "mixtral": lambda: transformers.MixtralConfig(
        **_GQA, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_GQA,
        **_more(head_dim=16),
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
    ),
}
_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
# Encoder-decoder families. BART's stacks differ in depth. Its output is untied from its input: if
# tied, a random model repeats its first token, which is the end token.
SEQ2SEQ: dict[str, Callable[[], PreTrainedConfig]] = {
    "t5": lambda: transformers.T5Config(**_T5),
    "t5_gated": lambda: transformers.T5Config(
        **_T5, **_more(tie_word_embeddings=False), feed_forward_proj="gated-gelu"
    ),
    "bart": lambda: transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=128,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        tie_word_embeddings=False,
        **_SPECIAL,
    ),
}
_T5GEMMA: dict[str, Any] = {
    **_GQA,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
# Rotary positions and windows in both stacks. Its soft cap has no SDPA.
EAGER_ONLY: dict[str, Callable[[], PreTrainedConfig]] = {
    "t5gemma": lambda: transformers.T5GemmaConfig(
        encoder=dict(_T5GEMMA),
        decoder=dict(_T5GEMMA),
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        **_more(decoder_start_token_id=1),
        **_SPECIAL,
    ),
}
# Families with sliding windows, in all or some layers. The key switches them on.
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {},
    "phi3": {},
    "mixtral": {},
    "gemma3": {},
    "qwen3": {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True},
}
# Layers that use the keys and values of another layer.
SHARING: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma3n": lambda: transformers.Gemma3nTextConfig(
        **{**_GQA, "num_hidden_layers": 4, "intermediate_size": [48] * 4},
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        sliding_window=6,
    ),
}
# Attention in chunks that are shorter than most tests' texts.
CHUNKED: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama4": lambda: transformers.Llama4TextConfig(
        **_GQA,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=6,
        layer_types=["chunked_attention", "full_attention"],
    ),
}
# Models that cannot take a prefix, with the reason.
REFUSED: dict[str, Callable[[], PreTrainedConfig]] = {
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "gptj": lambda: transformers.GPTJConfig(**_GPT2, rotary_dim=4),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4
    ),
    "bert": lambda: transformers.BertConfig(  # its tokens see the ones after them
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    ),
    # Layers without attention, with another kind of state.
    "lfm2": lambda: transformers.Lfm2Config(
        **_GQA, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
    "qwen3next": lambda: transformers.Qwen3NextConfig(
        **_GQA,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "recurrentgemma": lambda: transformers.RecurrentGemmaConfig(
        **_GQA, lru_width=32, attention_window_size=6, block_types=["recurrent", "attention"]
    ),
    # Experts that drop tokens depending on other rows of the batch.
    "switch": lambda: transformers.SwitchTransformersConfig(**_T5, num_experts=2),
}


def with_window(family: str, window: int) -> PreTrainedConfig:
    """A family's configuration with a sliding window of so many tokens."""
    config: Any = FAMILIES[family]()
    for name, value in WINDOWED[family].items():
        setattr(config, name, value)
    config.sliding_window = window
    return config


def build_model(config: PreTrainedConfig, attention: str, seed: int = 0) -> Any:
    """A random model; the same weights for the same seed whatever the attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_config(config, attn_implementation=attention)
        generator = torch.Generator().manual_seed(seed)
        for (
            parameter
        ) in model.parameters():  # with the usual 0.02 a tiny model hardly reacts to its input
            if parameter.ndim > 1:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(values * 0.7 / parameter.shape[-1] ** 0.5)
    return model.eval()


def build(config: PreTrainedConfig, kind: str = "eager", **options: Any) -> Backbone:
    """A backbone of a random model with our attention, which checks at every call that each layer
    took its prefix."""
    options.setdefault("debug", True)
    model = build_model(config, implementation(kind))
    return Backbone(model, make_tokenizer(), name="tiny", fingerprint="0" * 64, **options)


def random_kv(backbone: Backbone, length: int, seed: int, users: int = 1) -> Tensor:
    """Keys and values `[U, L, 2, H, P, D]`, large enough to matter in the attention."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((users, *kv_shape(backbone, length)), generator=generator)


def kv_shape(backbone: Backbone, length: int, stack: str = DECODER) -> tuple[int, ...]:
    """`(L, 2, H, P, D)` of a stack whose layers have one shape."""
    layers, *rest = backbone.facts.kv_shapes(length, [stack])[keys_name(stack, 0)]
    return (layers, 2, *rest)


def as_groups(kv_L2HPD: Tensor, stack: str = DECODER) -> dict[str, Tensor]:
    """Convert keys and values `[…, L, 2, H, P, D]` to a prefix's tensors."""
    return {
        keys_name(stack, 0): kv_L2HPD[..., 0, :, :, :],
        values_name(stack, 0): kv_L2HPD[..., 1, :, :, :],
    }


def as_layers(tensors: Mapping[str, Tensor], stack: str = DECODER) -> Tensor:
    """The inverse of `as_groups`."""
    return torch.stack([tensors[keys_name(stack, 0)], tensors[values_name(stack, 0)]], dim=-4)


def row_prefix(backbone: Backbone, kv_UL2HPD: Tensor, slots: Sequence[int]) -> RowPrefix:
    """Each row's slot of the pack's keys and values, in fp32."""
    pack = PackPrefix(as_groups(kv_UL2HPD), backbone.facts)
    return pack.of_rows(torch.tensor(slots), torch.float32)


def random_prefix(backbone: Backbone, method: Method, seed: int) -> Prefix:
    """A random prefix of the method, large enough to change the output."""
    generator = torch.Generator().manual_seed(seed)
    members = [
        {
            name: (2.0 if name == EMBEDDINGS else 1.0) * torch.randn(shape, generator=generator)
            for name, shape in method.shapes(backbone.facts).items()
        }
        for _ in range(method.members)
    ]
    meta = PrefixMeta.of(backbone, method, user_key=f"user-{seed}")
    return make_prefix(members, meta)


def prefix_rows(backbone: Backbone, prefixes: Sequence[Prefix | None]) -> RowPrefix | None:
    """The model's input for rows that each have a prefix or none."""
    ready = [None if prefix is None else make_ready(prefix, backbone) for prefix in prefixes]
    return rows_of(backbone, [None if one is None else one.members[0] for one in ready])


def random_ids(length: int, seed: int) -> list[int]:
    """Random token ids without special tokens."""
    source = random.Random(seed)
    return [source.randrange(3, VOCAB) for _ in range(length)]


def logits_of(
    backbone: Backbone,
    rows: Sequence[Sequence[int]],
    prefix: RowPrefix | None,
    side: str = "right",
) -> list[Tensor]:
    """Logits `[T, V]` of each row's tokens, with the rows padded on one side."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    places = []
    for r, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        places.append(slice(start, start + len(row)))
        ids[r, places[-1]] = torch.tensor(row)
        mask[r, places[-1]] = 1
    select_r = torch.tensor([r for r, row in enumerate(rows) for _ in row])
    select_t = torch.tensor([t for place in places for t in range(place.start, place.stop)])
    prompts = torch.tensor([len(row) for row in rows])
    logits = call(backbone, ids, mask, prefix, prompts=prompts, select=(select_r, select_t))
    return list(logits.split([len(row) for row in rows]))


def call(
    backbone: Backbone,
    ids: Tensor,
    mask: Tensor,
    prefix: RowPrefix | None,
    *,
    answers: Tensor | None = None,
    prompts: Tensor | None = None,
    select: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Logits of one call without a cache, at the positions `select` or at all."""
    plan = backbone._plan(mask, prefix, prompts, answers)
    return backbone._run(plan, prefix, ids, mask, answers=answers, select=select)


def batch_logits(backbone: Backbone, batch: Batch, prefix: RowPrefix | None) -> Tensor:
    """Logits `[N, V]` of a batch's supervised tokens."""
    return call(
        backbone,
        batch.input_ids,
        batch.attention_mask,
        prefix,
        answers=batch.decoder_input_ids,
        prompts=batch.prompt_lengths,
        select=(batch.rows, batch.cols),
    )


def random_row(length: int, supervised: int, seed: int) -> Encoded:
    """A row of random tokens; the last `supervised` ones have labels."""
    ids = random_ids(length, seed)
    return Encoded(ids, [IGNORE] * (length - supervised) + ids[length - supervised :])


def user_rows(name: str, train: int, valid: int, init_ids: int = 0, longest: int = 14) -> UserRows:
    """A user's random rows of different lengths, derived from the name alone; `init_ids` is the
    number of those."""
    source = random.Random(seed_of("rows", name))

    def rows(count: int) -> tuple[Encoded, ...]:
        made = []
        for _ in range(count):
            length = source.randrange(4, longest)
            made.append(
                random_row(length, source.randrange(1, length - 1), source.randrange(1 << 30))
            )
        return tuple(made)

    return UserRows(
        user_key=name,
        seed=seed_of("user", name),
        train=rows(train),
        valid=rows(valid),
        init_ids=tuple(random_ids(init_ids, source.randrange(1 << 30))),
    )
