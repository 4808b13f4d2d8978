"""What a model is, read off one pass of it: its attention's stacks, and whether a prefix can enter.

Reading the facts off a real pass works for every family without naming one. Models are refused
here in which a prefix would not enter every layer, or rows of a batch would not stay apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import get_layer_types_and_kwargs

from ptuning.errors import UnsupportedModel
from ptuning.model.attention import AttentionCall, AttentionContext, Place, mark_layer
from ptuning.model.facts import CROSS, DECODER, ENCODER, Facts, StackFacts
from ptuning.model.frozen_pass import FrozenPass

# Transformers' names of layers whose memory is keys and values.
CHUNKED = "chunked_attention"
ATTENTION_LAYERS = {"full_attention", "sliding_attention", CHUNKED}
# Its name of layers without a memory of their own: that attend to another's (Gemma 3n), or do not
# attend, which shows in the number that do.
NO_MEMORY = "dummy"
# Of models that take a prefix, for errors about those that do not.
EXAMPLES = "for instance Llama, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX, OPT, Phi, BART or T5"

Run = Callable[[AttentionContext, Tensor, Tensor | None], None]


def discover(model: Any, whole: FrozenPass, run: Run, device: torch.device) -> Facts:
    """Run a few tokens, note which modules attend, in which order and with which shapes, and mark
    them with their places. Raises UnsupportedModel.

    `run` is given the context, ids and, of an encoder-decoder model, an answer's ids. An encoder
    gets three tokens and a decoder two, so that the numbers of queries and keys tell apart a
    decoder's self-attention (2, 2), an encoder's (3, 3) and cross-attention (2, 3).
    """
    _check_rows_are_apart(model)
    context = AttentionContext(record_modules=True)
    start = _decoder_start(model) if model.config.is_encoder_decoder else None
    length = 2 if start is None else 3
    ids = torch.zeros((1, length), dtype=torch.long, device=device)
    run(context, ids, None if start is None else torch.full_like(ids[:, :2], start))
    kinds = {(2, 2): DECODER, (3, 3): ENCODER, (2, 3): CROSS}
    calls: dict[str, list[AttentionCall]] = {}
    for call in context.calls:
        calls.setdefault(kinds[(call.queries, call.keys)], []).append(call)
    if DECODER not in calls:
        raise _unsupported(model, set())
    if not all(call.causal for call in calls[DECODER]):
        raise UnsupportedModel(
            "the model's tokens see the ones after them, so it cannot predict these",
            seen=type(model).__name__,
            expected="a causal language model, or an encoder with a decoder",
            fix="use another backbone",
        )
    types = _layer_types(model, len(calls[DECODER])) if start is None else set()
    config = model.config.get_text_config()
    return Facts(
        stacks={stack: _stack(model, stack, found) for stack, found in calls.items()},
        hidden_size=int(getattr(whole.table, "embedding_dim", config.hidden_size)),
        vocab_size=int(config.vocab_size),
        max_positions=getattr(config, "max_position_embeddings", None),
        takes_embeddings=whole.takes_embeddings,
        decoder_start_id=start,
        front_stays=CHUNKED not in types,
    )


def _check_rows_are_apart(model: Any) -> None:
    """Experts with a capacity drop tokens because of others in the batch, other users'."""
    capacity = getattr(model.config, "expert_capacity", None)
    if capacity is not None:
        raise UnsupportedModel(
            "the model's experts take a limited number of tokens of a batch, so what one user "
            "asks could change another's answer",
            seen=f"{type(model).__name__}, expert_capacity {capacity}",
            expected="experts without a capacity, as Mixtral's or Qwen's",
            fix="use another backbone",
        )


def _decoder_start(model: Any) -> int:
    """The token that begins every answer, as generation takes it."""
    for holder in (getattr(model, "generation_config", None), model.config):
        start = getattr(holder, "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    raise UnsupportedModel(
        "the encoder-decoder model has no decoder_start_token_id",
        seen=type(model).__name__,
        expected="the token that begins an answer",
        fix="set it in the model's config.json",
    )


def _layer_types(model: Any, attending: int) -> set[str]:
    """Transformers' names of a causal model's kinds of layers. Raises where some do not attend:
    recurrent ones remember a text in states of their own, which no prefix is in."""
    config = model.config.get_text_config(decoder=True)
    types = {*get_layer_types_and_kwargs(config)[0]}
    if types - ATTENTION_LAYERS - {NO_MEMORY} or attending < config.num_hidden_layers:
        raise UnsupportedModel(
            "the model has layers without attention, which a prefix cannot enter",
            seen=f"{type(model).__name__}: {attending} of {config.num_hidden_layers} "
            f"layers attend; {', '.join(sorted(types))}",
            expected=f"attention in every layer, {EXAMPLES}",
            fix="use another backbone",
        )
    return types


def _stack(model: Any, stack: str, calls: Sequence[AttentionCall]) -> StackFacts:
    """Mark a stack's attention modules with their places; raises where shapes differ."""
    shapes = {shape for call in calls for shape in (call.key_shape, call.value_shape)}
    if len(shapes) != 1:
        raise _unsupported(model, shapes)
    before = None
    for layer, call in enumerate(calls):
        # The first layer's is all layers', unless they have their own. In an encoder virtual
        # tokens stand nowhere: its rows may be padded on either side.
        if stack == DECODER and getattr(call.module, "has_relative_attention_bias", False):
            before = _bias_before(call.module)
        mark_layer(call.module, Place(stack, layer, len(calls), before))
    heads, head_dim = shapes.pop()
    return StackFacts.of_one_shape(layers=len(calls), heads=heads, head_dim=head_dim)


def _bias_before(module: Any) -> Tensor:
    """`Place.before` of a layer's relative biases (T5's), which stay the same from its maximal
    distance on."""
    count = int(module.relative_attention_max_distance) + 1
    with torch.no_grad():
        bias = module.compute_bias(1, count, past_seen_tokens=count - 1)  # [1, heads, 1, N]
    return bias[0, :, 0].flip(-1).detach()


def _unsupported(model: nn.Module, shapes: set[tuple[int, int]]) -> UnsupportedModel:
    return UnsupportedModel(
        "the model's keys and values have different shapes"
        if shapes
        else "the model does not send its attention through Transformers' attention interface, "
        "so a prefix cannot enter it",
        seen=f"{type(model).__name__}, shapes (H, D): {sorted(shapes)}",
        expected=f"one shape in all layers of a stack, {EXAMPLES}",
        fix="use another backbone",
    )
