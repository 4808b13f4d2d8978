"""Discover a model's attention layers from one forward pass, and whether a prefix can enter them.

Recording a real pass works for every family without naming any. The reach of each layer (a window,
a chunk, all earlier tokens) is derived from the mask function that Transformers would use. Models
are refused here if a prefix would not enter every layer, or if attention_plan.py cannot plan their
masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.masking_utils import eager_mask, sdpa_mask

from ptuning.errors import UnsupportedModel
from ptuning.model.attention import BASES, PLAN, mark_layer, mask_dtype, read_attention_kind
from ptuning.model.attention_plan import AttentionFacts, AttentionLayer, Reach
from ptuning.model.facts import CROSS, DECODER, ENCODER, Facts, StackFacts

# Transformers' names of layer types that cache keys and values.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Its name of layers without a cache: they attend to another layer's keys (Gemma 3n), or do not
# attend at all (caught by counting the layers that do).
NO_MEMORY = "dummy"
# Models that take a prefix, for errors about those that do not.
EXAMPLES = "for instance Llama, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX, OPT, Phi, BART or T5"

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, query, key
Run = Callable[[Tensor, Tensor | None], None]


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one attention module's call. Shapes are (H, D); `queries` and `keys` are
    token counts. `mask_function` is the function that made its mask, or None if the mask was made
    in another way. `bias`, `[1, heads, T, S]`, is added to the scores, if given."""

    module: nn.Module
    key_shape: tuple[int, int]
    value_shape: tuple[int, int]
    queries: int
    keys: int
    mask_function: MaskFunction | None
    bias: Tensor | None


@dataclass
class Recorder:
    """Attention and mask functions that record the calls of a model's layers."""

    kind: str
    calls: list[AttentionCall] = field(default_factory=list)
    _masks: list[tuple[Tensor, MaskFunction]] = field(default_factory=list)

    def make_mask(self, *args: Any, **kwargs: Any) -> Tensor:
        """Transformers' mask, never None, so that each layer can be matched to its mask."""
        make: Any = eager_mask if self.kind == "eager" else sdpa_mask
        no_skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask: Tensor = make(*args, **kwargs | no_skips)
        self._masks.append((mask, kwargs["mask_function"]))
        return mask

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        kwargs.pop(PLAN)
        mask_function = next(
            (function for mask, function in self._masks if _is_same(mask, attention_mask)), None
        )
        self.calls.append(
            AttentionCall(
                module,
                (key.shape[1], key.shape[3]),
                (value.shape[1], value.shape[3]),
                query.shape[2],
                key.shape[2],
                mask_function,
                kwargs.get("position_bias"),
            )
        )
        return BASES[self.kind](module)(module, query, key, value, attention_mask, **kwargs)


def _is_same(mask: Tensor, given: Tensor | None) -> bool:
    """Whether a layer was given this mask. DeepSpeed's hooks replace a module's positional
    arguments by other tensors over the same memory. (`meta` tensors have no memory; their pointer
    is 0.)"""
    if given is None or mask is given:
        return mask is given
    return mask.data_ptr() == given.data_ptr() != 0 and mask.shape == given.shape


@contextmanager
def _recording(model: Any) -> Iterator[Recorder]:
    """Record a model's attention calls; its own attention is restored at the end."""
    recorder = Recorder(read_attention_kind(model))
    name = f"ptuning_recorder_{id(recorder)}"
    configs = {
        id(module.config): module.config
        for module in model.modules()
        if str(getattr(getattr(module, "config", None), "_attn_implementation", "")).startswith(
            "ptuning_"
        )
    }
    before = [(config, config._attn_implementation) for config in configs.values()]
    AttentionInterface.register(name, recorder.attend)
    AttentionMaskInterface.register(name, recorder.make_mask)
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield recorder
    finally:
        for config, loaded_with in before:
            config._attn_implementation = loaded_with
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


def discover_facts(
    model: Any, table: nn.Module, takes_embeddings: bool, run: Run, device: torch.device
) -> tuple[Facts, AttentionFacts]:
    """Run a few tokens, record which modules attend, in which order and with which shapes and
    masks, and mark each module with its layer. Raises UnsupportedModel.

    `table` is the input embedding. `run` takes ids and, for an encoder-decoder model, an answer's
    ids. The encoder gets three tokens and the decoder two, so the numbers of queries and keys
    identify decoder self-attention (2, 2), encoder self-attention (3, 3) and cross-attention
    (2, 3).
    """
    start = _decoder_start(model) if model.config.is_encoder_decoder else None
    length = 2 if start is None else 3
    ids = torch.zeros((1, length), dtype=torch.long, device=device)
    with _recording(model) as recorder:
        run(ids, None if start is None else torch.full_like(ids[:, :2], start))
    stack_of_counts = {(2, 2): DECODER, (3, 3): ENCODER, (2, 3): CROSS}
    calls: dict[str, list[AttentionCall]] = {}
    for call in recorder.calls:
        calls.setdefault(stack_of_counts[(call.queries, call.keys)], []).append(call)
    if DECODER not in calls:
        raise _unsupported(model, set())
    layers = {stack: _mark_layers(model, stack, found, device) for stack, found in calls.items()}
    if not all(layer.reach.ahead == 0 for layer in layers[DECODER]):
        raise UnsupportedModel(
            "the model's tokens attend to later tokens, so it cannot predict the next one",
            seen=type(model).__name__,
            expected="a causal language model, or an encoder with a decoder",
            fix="use another backbone",
        )
    if start is None:
        _check_every_layer_attends(model, len(calls[DECODER]))
    config = model.config.get_text_config()
    facts = Facts(
        stacks={stack: _stack_facts(model, found) for stack, found in calls.items()},
        hidden_size=int(getattr(table, "embedding_dim", config.hidden_size)),
        vocab_size=int(getattr(table, "num_embeddings", config.vocab_size)),
        max_positions=getattr(config, "max_position_embeddings", None),
        takes_embeddings=takes_embeddings,
        decoder_start_id=start,
        front_stays=all(layer.reach.chunk is None for layer in layers[DECODER]),
    )
    dtype = next(model.parameters()).dtype
    return facts, AttentionFacts(layers, mask_dtype(recorder.kind, dtype))


def _decoder_start(model: Any) -> int:
    """The token that begins every answer; the generation config comes first, as in `generate`."""
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


def _check_every_layer_attends(model: Any, attending: int) -> None:
    """Raise if some layers of a causal model do not attend: recurrent layers keep their own state,
    which a prefix does not reach."""
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


def _stack_facts(model: Any, calls: Sequence[AttentionCall]) -> StackFacts:
    """The facts of one stack. Raises UnsupportedModel if its layers' shapes differ."""
    shapes = {shape for call in calls for shape in (call.key_shape, call.value_shape)}
    if len(shapes) != 1:
        raise _unsupported(model, shapes)
    heads, head_dim = shapes.pop()
    return StackFacts.of_one_shape(layers=len(calls), heads=heads, head_dim=head_dim)


def _mark_layers(
    model: Any, stack: str, calls: Sequence[AttentionCall], device: torch.device
) -> tuple[AttentionLayer, ...]:
    """Mark a stack's attention modules with their layers."""
    layers, bias, reaches = [], None, dict[MaskFunction | None, Reach]()
    for number, call in enumerate(calls):
        # T5 has one bias table, in its first layer, for all; other models have one in every layer.
        # In an encoder virtual tokens have no position: its rows may be padded on either side.
        if stack == DECODER and getattr(call.module, "has_relative_attention_bias", False):
            bias = _relative_bias(call.module)
        elif call.bias is not None and bias is None:
            bias = call.bias.new_zeros((call.bias.shape[1], 1))
        if call.mask_function not in reaches:
            reaches[call.mask_function] = _reach(model, call, device)
        reach = reaches[call.mask_function]
        layers.append(AttentionLayer(stack, number, len(calls), reach, bias))
        mark_layer(call.module, layers[-1])
    return tuple(layers)


def _relative_bias(module: Any) -> Tensor:
    """`AttentionLayer.bias` from a layer's relative-position biases (T5's), which are constant
    beyond its maximum distance."""
    count = int(module.relative_attention_max_distance) + 1
    with torch.no_grad():
        bias = module.compute_bias(1, count, past_seen_tokens=count - 1)  # [1, heads, 1, N]
    return bias[0, :, 0].flip(-1).detach()


FARTHEST = 1 << 17  # tokens; a larger window counts as none
_PROBED = (0, 1, 2, 3, 1000, FARTHEST - 1)


def _reach(model: Any, call: AttentionCall, device: torch.device) -> Reach:
    """The Reach that is equivalent to a layer's mask function. Raises UnsupportedModel if no Reach
    is."""
    refused = UnsupportedModel(
        "the model uses an attention mask of an unknown kind, so prefix visibility cannot be "
        "guaranteed",
        seen=f"{type(model).__name__}, {type(call.module).__name__}",
        expected="Transformers' causal, sliding-window, chunked or bidirectional masks",
        fix="use another backbone",
    )
    if call.mask_function is None:
        raise refused
    # Mask functions may close over tensors on the device; `meta` tensors cannot be read.
    numbers = torch.arange(FARTHEST, device="cpu" if device.type == "meta" else device)
    try:
        # The queries that do not attend to token 0, and the keys that token 0 attends to.
        lost = ~_evaluate(call.mask_function, numbers, numbers[:1])[:, 0]
        ahead = _evaluate(call.mask_function, numbers[:1], numbers)[0]
        back = int(lost.nonzero()[0, 0]) if bool(lost.any()) else None
        reach = Reach(
            back=None if back is None else back - 1,
            ahead=None if bool(ahead.all()) else int(ahead.sum()) - 1,
        )
        near = () if back is None else (back - 1, back, back + 1, 2 * back, 3 * back + 1)
        queries = numbers[sorted({n for n in (*_PROBED, *near) if n < FARTHEST})]
        actual = _evaluate(call.mask_function, queries, numbers)
    except (RuntimeError, IndexError, TypeError) as error:  # it reads more than token numbers
        raise refused from error
    for candidate in (reach, Reach(ahead=reach.ahead, chunk=back)):
        if bool((candidate.sees(queries[:, None], numbers) == actual).all()):
            return candidate
    raise refused


def _evaluate(function: MaskFunction, queries: Tensor, keys: Tensor) -> Tensor:
    """The mask of one row and head, bool `[queries, keys]`."""
    zero = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=queries.device)
    mask = function(zero, zero, queries[None, None, :, None], keys[None, None, None, :])
    return mask.expand(1, 1, len(queries), len(keys))[0, 0]


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
