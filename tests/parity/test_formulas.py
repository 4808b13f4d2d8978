"""Methods that PEFT does not have, against small models written out by hand.

The formulas are those of the papers (Li and Liang 2021, equations 1 to 3; Liu et al. 2021, equation
2). They are computed in fp64 with the frozen weights, one row at a time, without cache or batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tiny_backbones import (
    FAMILIES,
    SEQ2SEQ,
    as_layers,
    build,
    build_model,
    prefix_rows,
    random_ids,
    random_row,
)
from torch import Tensor

from ptuning.data.encode import IGNORE, Encoded
from ptuning.data.layout import Layout
from ptuning.methods.prefix import PrefixTuning
from ptuning.methods.ptuning import PTuning
from ptuning.model.attention_plan import Tokens
from ptuning.model.backbone import Backbone
from ptuning.model.batch import EMBEDDINGS, PackPrefix
from ptuning.model.facts import CROSS, DECODER, ENCODER
from ptuning.prefix.artifact import PrefixMeta, make_prefix
from ptuning.train.step import collate

torch.set_num_threads(1)
P = 3


# The formulas


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v over the keys that each token sees: `q` `[H, T, D]`, `k`
    and `v` `[H, S, D]`, `seen` bool `[T, S]`, `bias` `[H, T, S]`."""
    scores = torch.exp(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + bias) * seen
    return scores / scores.sum(-1, keepdim=True) @ v


def with_prefix(
    prefix: Tensor | None, k: Tensor, v: Tensor, seen: Tensor, sees_prefix: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[P_k; K] and [P_v; V] for `prefix` `[2, H, P, D]`; `sees_prefix` is bool `[T]`."""
    if prefix is None:
        return k, v, seen
    inside = sees_prefix[:, None].expand(-1, prefix.shape[2])
    return torch.cat([prefix[0], k], 1), torch.cat([prefix[1], v], 1), torch.cat([inside, seen], 1)


def norm(x: Tensor, module: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
    return centred / scale * module.weight.double() + module.bias.double()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[T, H * D]` to `[H, T, D]`."""
    return x.view(len(x), heads, -1).transpose(0, 1)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation, as in GPT-2 and T5."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gpt2_by_hand(
    model: Any,
    ids: Sequence[int],
    positions: Tensor,
    prefix: dict[int, Tensor],
    sees_prefix: Tensor,
) -> Tensor:
    """Logits `[T, V]`; `prefix[layer]` is `[2, H, P, D]`."""
    body = model.transformer

    def product(x: Tensor, module: Any) -> Tensor:  # its weights are [in, out]
        return x @ module.weight.double() + module.bias.double()

    x = body.wte.weight.double()[list(ids)] + body.wpe.weight.double()[positions]
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    for number, layer in enumerate(body.h):
        q, k, v = (
            split_heads(part, model.config.n_head)
            for part in product(norm(x, layer.ln_1), layer.attn.c_attn).chunk(3, dim=-1)
        )
        own = with_prefix(prefix.get(number), k, v, causal, sees_prefix)
        x = x + product(join_heads(attention(q, *own)), layer.attn.c_proj)
        y = gelu(product(norm(x, layer.ln_2), layer.mlp.c_fc))
        x = x + product(y, layer.mlp.c_proj)
    return norm(x, body.ln_f) @ model.lm_head.weight.double().T


def bart_by_hand(
    model: Any, source: Sequence[int], answer: Sequence[int], prefix: dict[str, Tensor]
) -> Tensor:
    """Logits `[S, V]`; `prefix[stack]` is `[L, 2, H, P, D]`. The answer's positions come after
    the decoder's virtual tokens; the prompt's positions are those without a prefix."""
    heads = model.config.encoder_attention_heads

    def product(x: Tensor, module: Any) -> Tensor:
        return x @ module.weight.double().T + module.bias.double()

    def attend(x: Tensor, into: Tensor, module: Any, own: Tensor | None, seen: Tensor) -> Tensor:
        q = split_heads(product(x, module.q_proj), heads)
        k, v = (split_heads(product(into, part), heads) for part in (module.k_proj, module.v_proj))
        every = torch.ones(len(x), dtype=torch.bool)
        return product(
            join_heads(attention(q, *with_prefix(own, k, v, seen, every))), module.out_proj
        )

    def embed(ids: Sequence[int], body: Any, at: int = 0) -> Tensor:
        places = body.embed_positions.weight.double()[2 + at : 2 + at + len(ids)]
        return norm(body.embed_tokens.weight.double()[list(ids)] + places, body.layernorm_embedding)

    def layer_of(stack: str, number: int) -> Tensor | None:
        return prefix[stack][number] if stack in prefix else None

    def feed_forward(x: Tensor, layer: Any) -> Tensor:
        y = product(x, layer.fc1)
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        return norm(x + product(y, layer.fc2), layer.final_layer_norm)

    encoder, decoder = model.model.encoder, model.model.decoder
    everything = torch.ones(len(source), len(source), dtype=torch.bool)
    x = embed(source, encoder)
    for number, layer in enumerate(encoder.layers):
        out = attend(x, x, layer.self_attn, layer_of(ENCODER, number), everything)
        x = feed_forward(norm(x + out, layer.self_attn_layer_norm), layer)
    causal = torch.ones(len(answer), len(answer), dtype=torch.bool).tril()
    across = torch.ones(len(answer), len(source), dtype=torch.bool)
    y = embed(answer, decoder, prefix[DECODER].shape[-2] if DECODER in prefix else 0)
    for number, layer in enumerate(decoder.layers):
        out = attend(y, y, layer.self_attn, layer_of(DECODER, number), causal)
        y = norm(y + out, layer.self_attn_layer_norm)
        out = attend(y, x, layer.encoder_attn, layer_of(CROSS, number), across)
        y = norm(y + out, layer.encoder_attn_layer_norm)
        y = feed_forward(y, layer)
    return y @ model.lm_head.weight.double().T + model.final_logits_bias.double()


def t5_bucket(distance: int, *, ahead: bool) -> int:
    """The bucket of a key `distance` positions before its query, in the tiny T5 with 8 buckets for
    distances up to 16 (Raffel et al. 2020, section 2.1). Half of the buckets are exact, the rest
    logarithmic. With `ahead`, keys after the query have the other half of the buckets."""
    first, count = 0, 8
    if ahead:
        first, count = (4, 4) if distance < 0 else (0, 4)
        distance = abs(distance)
    exact, distance = count // 2, max(distance, 0)
    if distance < exact:
        return first + distance
    wide = math.log(distance / exact) / math.log(16 / exact) * (count - exact)
    return first + min(exact + int(wide), count - 1)


def t5_by_hand(
    model: Any, source: Sequence[int], answer: Sequence[int], prefix: dict[str, Tensor]
) -> Tensor:
    """Logits `[S, V]`; `prefix[stack]` is `[L, 2, H, P, D]`. The decoder's virtual tokens have the
    distances of tokens directly before the answer. Those of the encoder and the cross attention
    have distance zero: the text after them may be padded on either side."""
    heads, root = model.config.num_heads, math.sqrt(model.config.d_kv)

    def product(x: Tensor, module: Any) -> Tensor:
        return x @ module.weight.double().T

    def rms(x: Tensor, module: Any) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
        return x / scale * module.weight.double()

    def biases(stack: Any, count: int, before: int, *, ahead: bool) -> Tensor:
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.double()
        columns = range(-before, count)
        buckets = [[t5_bucket(t - c, ahead=ahead) for c in columns] for t in range(count)]
        return table[torch.tensor(buckets)].permute(2, 0, 1)

    def attend(
        x: Tensor, into: Tensor, module: Any, own: Tensor | None, seen: Tensor, bias: Tensor
    ) -> Tensor:
        q = split_heads(product(x, module.q), heads) * root  # T5 does not divide by it
        k, v = (split_heads(product(into, part), heads) for part in (module.k, module.v))
        every = torch.ones(len(x), dtype=torch.bool)
        k, v, seen = with_prefix(own, k, v, seen, every)
        unbiased = torch.zeros(heads, len(x), k.shape[1] - bias.shape[-1], dtype=torch.float64)
        scores = torch.cat([unbiased, bias], -1)
        return product(join_heads(attention(q, k, v, seen, scores)), module.o)

    def layer_of(stack: str, number: int) -> Tensor | None:
        return prefix[stack][number] if stack in prefix else None

    def feed_forward(x: Tensor, layer: Any) -> Tensor:
        y, dense = rms(x, layer.layer_norm), layer.DenseReluDense
        if hasattr(dense, "wi"):
            y = product(y, dense.wi).clamp_min(0)
        else:
            y = gelu(product(y, dense.wi_0)) * product(y, dense.wi_1)
        return x + product(y, dense.wo)

    def embed(ids: Sequence[int]) -> Tensor:
        return model.shared.weight.double()[list(ids)]

    everything = torch.ones(len(source), len(source), dtype=torch.bool)
    bias = biases(model.encoder, len(source), 0, ahead=True)
    x = embed(source)
    for number, block in enumerate(model.encoder.block):
        own, inner = layer_of(ENCODER, number), block.layer[0]
        normed = rms(x, inner.layer_norm)
        x = x + attend(normed, normed, inner.SelfAttention, own, everything, bias)
        x = feed_forward(x, block.layer[1])
    x = rms(x, model.encoder.final_layer_norm)
    causal = torch.ones(len(answer), len(answer), dtype=torch.bool).tril()
    across = torch.ones(len(answer), len(source), dtype=torch.bool)
    before = prefix[DECODER].shape[-2] if DECODER in prefix else 0
    bias = biases(model.decoder, len(answer), before, ahead=False)
    none = torch.zeros(heads, len(answer), len(source), dtype=torch.float64)
    y = embed(answer)
    for number, block in enumerate(model.decoder.block):
        inner, cross = block.layer[0], block.layer[1]
        normed = rms(y, inner.layer_norm)
        y = y + attend(normed, normed, inner.SelfAttention, layer_of(DECODER, number), causal, bias)
        normed = rms(y, cross.layer_norm)
        y = y + attend(normed, x, cross.EncDecAttention, layer_of(CROSS, number), across, none)
        y = feed_forward(y, block.layer[2])
    y = rms(y, model.decoder.final_layer_norm)
    if model.config.scale_decoder_outputs:
        y = y * model.config.d_model**-0.5
    return product(y, model.lm_head)


def nll(logits: Tensor, targets: Sequence[int]) -> Tensor:
    """-log p of each target; `logits` is `[N, V]`."""
    scores = logits.double().exp()
    return -torch.log(scores[torch.arange(len(targets)), list(targets)] / scores.sum(-1))


PAIRS_BY_HAND = {"bart": bart_by_hand, "t5": t5_by_hand, "t5_gated": t5_by_hand}

# Ours against the formulas

ROWS = [random_row(9, 3, 1), random_row(6, 5, 2), random_row(12, 4, 3)]
SLOTS = [1, 0, 1]


def compare(
    backbone: Backbone,
    pack: PackPrefix,
    by_hand: Callable[[Encoded, int], Tensor],
    arranged: Callable[[Encoded], Encoded] = lambda row: row,
) -> None:
    """Compare losses `[N]` of two users' rows of different lengths, and the gradients of the
    prefixes (the leaves of `pack`). `arranged` puts virtual tokens into a row."""
    batch = collate(
        [arranged(row) for row in ROWS], backbone.device, backbone.facts.decoder_start_id
    )
    ours = backbone.token_nll(batch, pack.of_rows(torch.tensor(SLOTS), torch.float32))
    expected = torch.cat([by_hand(row, slot) for row, slot in zip(ROWS, SLOTS, strict=True)])
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    leaves = list(pack.tensors.values())
    with torch.no_grad():
        zero = PackPrefix(
            {name: torch.zeros_like(p) for name, p in pack.tensors.items()},
            backbone.facts,
            pack.visibility,
        )
        other = backbone.token_nll(batch, zero.of_rows(torch.tensor(SLOTS), torch.float32))
    assert (ours - other).abs().max() > 1e-2, "the prefix changed nothing"
    for mine, theirs in zip(
        torch.autograd.grad(ours.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4)


def random_pack(backbone: Backbone, method: PrefixTuning) -> PackPrefix:
    torch.manual_seed(4)
    shapes = method.shapes(backbone.facts)
    return PackPrefix(
        {name: torch.randn((2, *shape)).requires_grad_() for name, shape in shapes.items()},
        backbone.facts,
        method.visibility,
    )


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "method",
    [
        PrefixTuning(num_virtual_tokens=P),
        PrefixTuning(num_virtual_tokens=P, layers=1),
        PrefixTuning(num_virtual_tokens=P, placement="infix"),
        PrefixTuning(num_virtual_tokens=P, placement="infix", layers=1),
    ],
    ids=["all-layers", "top-layer", "infix", "infix-top-layer"],
)
def test_a_causal_models_prefix_is_keys_and_values_before_its_own(
    method: PrefixTuning, kind: str
) -> None:
    """The prompt's last token and later tokens see an infix, and their positions come after it.
    Tokens that do not see it keep the positions they would have without it."""
    backbone = build(FAMILIES["gpt2"](), kind)
    pack = random_pack(backbone, method)
    layers = backbone.facts.stacks[DECODER].layers

    def by_hand(row: Encoded, slot: int) -> Tensor:
        ids, at = row.input_ids, row.prompt_length
        kv = as_layers(pack.tensors)[slot].double()
        prefix = {layers - len(kv) + n: kv[n] for n in range(len(kv))}
        places = torch.arange(len(ids))
        sees = places >= (at - 1 if method.placement == "infix" else 0)
        logits = gpt2_by_hand(backbone.model, ids, places + P * sees, prefix, sees)
        return nll(logits[at - 1 : -1], ids[at:])

    compare(backbone, pack, by_hand)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("family", PAIRS_BY_HAND)
@pytest.mark.parametrize(
    "stacks", [(ENCODER,), (DECODER,), (CROSS,), (ENCODER, DECODER, CROSS)], ids="-".join
)
def test_an_encoder_decoder_models_prefix_enters_each_of_its_stacks(
    stacks: tuple[Any, ...], family: str, kind: str
) -> None:
    backbone = build(SEQ2SEQ[family](), kind)
    pack = random_pack(backbone, PrefixTuning(num_virtual_tokens=P, stacks=stacks))
    start = backbone.facts.decoder_start_id
    assert start is not None

    def by_hand(row: Encoded, slot: int) -> Tensor:
        at = row.prompt_length
        answer = row.input_ids[at:]
        prefix = {stack: as_layers(pack.tensors, stack)[slot].double() for stack in stacks}
        moved = [start, *answer[:-1]]
        return nll(PAIRS_BY_HAND[family](backbone.model, row.input_ids[:at], moved, prefix), answer)

    compare(backbone, pack, by_hand)


# Virtual tokens at the input

TEMPLATES = [
    "{p:1}{prompt}{p:2} so {completion}",
    "{prompt}{p:3}{completion}",
    " well {p:2}{prompt} {p:1}",
    "{p:3}{prompt}{completion}",
]


def pieces(text: str, ids: Sequence[int], backbone: Backbone) -> list[int | None]:
    """A template's tokens before the completion, by hand; None stands for a virtual token."""
    found: list[int | None] = []
    while text:
        field, brace, rest = text.partition("}") if text[0] == "{" else ("", "", "")
        if not brace:
            plain, _, _ = text.partition("{")
            found += backbone.tokenizer(plain, add_special_tokens=False)["input_ids"]
            text = text[len(plain) :]
            continue
        text = rest
        if field == "{prompt":
            found += ids
        elif field != "{completion":
            found += [None] * int(field.removeprefix("{p:"))
    return found


def embed_tokens(model: Any, tokens: Sequence[int | None], virtual: Tensor) -> Tensor:
    """`[1, T, E]`, from the encoder's table, which may differ from the model's."""
    reader = model.get_encoder() if model.config.is_encoder_decoder else model
    table, free = reader.get_input_embeddings(), iter(virtual)
    rows = [next(free) if t is None else table(torch.tensor([[t]]))[0, 0] for t in tokens]
    assert next(free, None) is None
    return torch.stack(rows)[None]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt", "bart", "t5"])
def test_a_template_is_one_row_of_embeddings_to_a_plain_model(family: str, template: str) -> None:
    """Losses and gradients. Virtual tokens have positions like real ones."""
    families = {**FAMILIES, **SEQ2SEQ}
    backbone, plain = build(families[family]()), build_model(families[family](), "eager")
    plain.requires_grad_(False)
    torch.manual_seed(5)
    virtual = torch.randn(2, P, backbone.facts.hidden_size, requires_grad=True)
    start = backbone.facts.decoder_start_id
    arrangement = Layout.parse(template).bind(backbone.template)

    def by_hand(row: Encoded, slot: int) -> Tensor:
        prompt = pieces(template, row.input_ids[: row.prompt_length], backbone)
        answer = row.input_ids[row.prompt_length :]
        if start is None:
            inputs = embed_tokens(plain, [*prompt, *answer], virtual[slot])
            logits = plain(inputs_embeds=inputs).logits[0, len(prompt) - 1 : -1]
        else:
            moved = torch.tensor([[start, *answer[:-1]]])
            inputs = embed_tokens(plain, prompt, virtual[slot])
            logits = plain(inputs_embeds=inputs, decoder_input_ids=moved).logits[0]
        return nll(logits, answer)

    pack = PackPrefix({EMBEDDINGS: virtual}, backbone.facts, PTuning(template=template).visibility)
    compare(backbone, pack, by_hand, arrangement.row)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
def test_a_template_is_computed_alike_in_generation_and_training(
    family: str, template: str
) -> None:
    """Also where leading virtual tokens were compiled to keys and values."""
    backbone, plain = build(FAMILIES[family]()), build_model(FAMILIES[family](), "eager")
    torch.manual_seed(5)
    virtual = torch.randn(P, backbone.facts.hidden_size)
    meta = PrefixMeta.of(backbone, PTuning(template=template), user_key="k" * 52)
    prefix, prompt = make_prefix([{EMBEDDINGS: virtual}], meta), random_ids(7, 1)
    arrangement = prefix.arrangement(backbone.template)
    ids = torch.tensor([arrangement.without_front().prompt(prompt)])
    if not arrangement.in_front:
        assert ids.tolist() == [arrangement.prompt(prompt)]
    ours = backbone.step(
        ids,
        Tokens.of_mask(torch.ones_like(ids), ids.shape[1]),
        prefix_rows(backbone, [prefix]),
        None,
    )[0]
    with torch.no_grad():
        tokens = pieces(template, prompt, backbone)
        expected = plain(inputs_embeds=embed_tokens(plain, tokens, virtual)).logits[0, -1]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_without_a_prefix_the_formulas_equal_the_plain_models() -> None:
    """This checks the formulas above against the plain models."""
    row = ROWS[0]
    ids, at = row.input_ids, row.prompt_length
    with torch.no_grad():
        model = build_model(FAMILIES["gpt2"](), "eager")
        plain = model(input_ids=torch.tensor([ids])).logits[0]
        places = torch.arange(len(ids))
        mine = gpt2_by_hand(model, ids, places, {}, places >= 0)
        torch.testing.assert_close(mine, plain.double(), atol=1e-5, rtol=1e-5)
        source, answer = ids[:at], ids[at:]
        for family, by_hand in PAIRS_BY_HAND.items():
            model = build_model(SEQ2SEQ[family](), "eager")
            plain = model(
                input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([answer])
            ).logits[0]
            mine = by_hand(model, source, answer, {})
            torch.testing.assert_close(mine, plain.double(), atol=1e-5, rtol=1e-5)
    labels = [label for label in row.labels if label != IGNORE]
    assert labels == ids[at:]
