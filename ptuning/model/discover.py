"""What a model is, read off one pass of it: its attention's layers, and whether a prefix can enter.

Reading the facts off a real pass works for every family without naming one. What each layer lets
a token attend to (a window, a chunk, all before it) is read off the mask function that
Transformers would have used. Models are refused here in which a prefix would not enter every
layer, or whose masks are of a kind that attention_plan.py does not plan.
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
from ptuning.model.attention import BASES, PLAN, kind_of, mark_layer, mask_dtype
from ptuning.model.attention_plan import AttentionFacts, AttentionLayer, Reach
from ptuning.model.facts import CROSS, DECODER, ENCODER, Facts, StackFacts

# Transformers' names of layers whose memory is keys and values.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Its name of layers without a memory of their own: they attend to another's keys (Gemma 3n), or
# do not attend at all (caught by counting the layers that do).
NO_MEMORY = "dummy"
# Of models that take a prefix, for errors about those that do not.
EXAMPLES = "for instance Llama, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX, OPT, Phi, BART or T5"

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, query, key
Run = Callable[[Tensor, Tensor | None], None]


@dataclass(frozen=True)
class AttentionCall:
    """What one attention module was called with. Shapes are (H, D); `queries` and `keys` are
    numbers of tokens; `sees` is the function that its mask was made with, None: some other way;
    `bias`, `[1, heads, T, S]`: what it adds to its scores, if anything."""

    module: nn.Module
    key_shape: tuple[int, int]
    value_shape: tuple[int, int]
    queries: int
    keys: int
    sees: MaskFunction | None
    bias: Tensor | None


@dataclass
class Recorder:
    """Attention and mask functions that note what a model's layers are called with."""

    kind: str
    calls: list[AttentionCall] = field(default_factory=list)
    _masks: list[tuple[Tensor, MaskFunction]] = field(default_factory=list)

    def make_mask(self, *args: Any, **kwargs: Any) -> Tensor:
        """Transformers' mask, never None, so that its layers can be told by it."""
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
        sees = next((sees for mask, sees in self._masks if _is_same(mask, attention_mask)), None)
        self.calls.append(
            AttentionCall(
                module,
                (key.shape[1], key.shape[3]),
                (value.shape[1], value.shape[3]),
                query.shape[2],
                key.shape[2],
                sees,
                kwargs.get("position_bias"),
            )
        )
        return BASES[self.kind](module)(module, query, key, value, attention_mask, **kwargs)


def _is_same(mask: Tensor, given: Tensor | None) -> bool:
    """Whether a layer was given this mask. DeepSpeed's hooks hand a module's positional arguments
    on as other tensors of the same memory. (On `meta` there is no memory: its pointer is 0.)"""
    if given is None or mask is given:
        return mask is given
    return mask.data_ptr() == given.data_ptr() != 0 and mask.shape == given.shape


@contextmanager
def _recording(model: Any) -> Iterator[Recorder]:
    """Record a model's attention in place of the attention that it was loaded with."""
    recorder = Recorder(kind_of(model))
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


def discover(
    model: Any, table: nn.Module, takes_embeddings: bool, run: Run, device: torch.device
) -> tuple[Facts, AttentionFacts]:
    """Run a few tokens, note which modules attend, in which order and with which shapes and masks,
    and mark them with their layers. Raises UnsupportedModel.

    `table` is the input embedding. `run` is given ids and, of an encoder-decoder model, an
    answer's ids. An encoder gets three tokens and a decoder two, so that the numbers of queries
    and keys tell apart a decoder's self-attention (2, 2), an encoder's (3, 3) and cross-attention
    (2, 3).
    """
    start = _decoder_start(model) if model.config.is_encoder_decoder else None
    length = 2 if start is None else 3
    ids = torch.zeros((1, length), dtype=torch.long, device=device)
    with _recording(model) as recorder:
        run(ids, None if start is None else torch.full_like(ids[:, :2], start))
    kinds = {(2, 2): DECODER, (3, 3): ENCODER, (2, 3): CROSS}
    calls: dict[str, list[AttentionCall]] = {}
    for call in recorder.calls:
        calls.setdefault(kinds[(call.queries, call.keys)], []).append(call)
    if DECODER not in calls:
        raise _unsupported(model, set())
    layers = {stack: _mark_layers(model, stack, found, device) for stack, found in calls.items()}
    if not all(layer.reach.ahead == 0 for layer in layers[DECODER]):
        raise UnsupportedModel(
            "the model's tokens attend to the ones after them, so it cannot predict these",
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


def _check_every_layer_attends(model: Any, attending: int) -> None:
    """Raise where some layers of a causal model do not attend: recurrent ones remember a text in
    states of their own, which no prefix is in."""
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
    """Raises where shapes differ."""
    shapes = {shape for call in calls for shape in (call.key_shape, call.value_shape)}
    if len(shapes) != 1:
        raise _unsupported(model, shapes)
    heads, head_dim = shapes.pop()
    return StackFacts.of_one_shape(layers=len(calls), heads=heads, head_dim=head_dim)


def _mark_layers(
    model: Any, stack: str, calls: Sequence[AttentionCall], device: torch.device
) -> tuple[AttentionLayer, ...]:
    """Tell a stack's attention modules which layers they are."""
    layers, bias, reaches = [], None, dict[MaskFunction | None, Reach]()
    for number, call in enumerate(calls):
        # The first layer's is all layers', unless they have their own. In an encoder virtual
        # tokens stand nowhere: its rows may be padded on either side.
        if stack == DECODER and getattr(call.module, "has_relative_attention_bias", False):
            bias = _relative_bias(call.module)
        elif call.bias is not None and bias is None:
            bias = call.bias.new_zeros((call.bias.shape[1], 1))
        if call.sees not in reaches:
            reaches[call.sees] = _reach(model, call, device)
        layers.append(AttentionLayer(stack, number, len(calls), reaches[call.sees], bias))
        mark_layer(call.module, layers[-1])
    return tuple(layers)


def _relative_bias(module: Any) -> Tensor:
    """`AttentionLayer.bias` of a layer's relative biases (T5's), which stay the same from its
    maximal distance on."""
    count = int(module.relative_attention_max_distance) + 1
    with torch.no_grad():
        bias = module.compute_bias(1, count, past_seen_tokens=count - 1)  # [1, heads, 1, N]
    return bias[0, :, 0].flip(-1).detach()


FARTHEST = 1 << 17  # tokens; a window beyond it is none
_PROBED = (0, 1, 2, 3, 1000, FARTHEST - 1)


def _reach(model: Any, call: AttentionCall, device: torch.device) -> Reach:
    """The Reach that a layer's mask function amounts to. Raises where it is none."""
    refused = UnsupportedModel(
        "the model masks its attention in a way of its own, so a prefix cannot be made visible "
        "safely",
        seen=f"{type(model).__name__}, {type(call.module).__name__}",
        expected="Transformers' causal, sliding-window, chunked or bidirectional masks",
        fix="use another backbone",
    )
    if call.sees is None:
        raise refused
    # Functions may hold tensors of the device; on `meta` there is nothing to read.
    numbers = torch.arange(FARTHEST, device="cpu" if device.type == "meta" else device)
    try:
        lost = ~_evaluate(call.sees, numbers, numbers[:1])[:, 0]  # who does not see token 0
        ahead = _evaluate(call.sees, numbers[:1], numbers)[0]  # whom token 0 sees
        back = int(lost.nonzero()[0, 0]) if bool(lost.any()) else None
        reach = Reach(
            back=None if back is None else back - 1,
            ahead=None if bool(ahead.all()) else int(ahead.sum()) - 1,
        )
        near = () if back is None else (back - 1, back, back + 1, 2 * back, 3 * back + 1)
        queries = numbers[sorted({n for n in (*_PROBED, *near) if n < FARTHEST})]
        actual = _evaluate(call.sees, queries, numbers)
    except (RuntimeError, IndexError, TypeError) as error:  # not a function of numbers alone
        raise refused from error
    for candidate in (reach, Reach(ahead=reach.ahead, chunk=back)):
        if bool((candidate.sees(queries[:, None], numbers) == actual).all()):
            return candidate
    raise refused


def _evaluate(sees: MaskFunction, queries: Tensor, keys: Tensor) -> Tensor:
    """Bool `[queries, keys]` of one row and head."""
    zero = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=queries.device)
    found = sees(zero, zero, queries[None, None, :, None], keys[None, None, None, :])
    return found.expand(1, 1, len(queries), len(keys))[0, 0]


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
