"""The frozen language model: loaded once, never changed, called through one seam.

`Backbone` is what everything else talks to. Its three calls (`token_nll`, `capture`,
`step`) all go through `FrozenPass`, one module whose forward DeepSpeed can shard.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ptuning import attention
from ptuning.attention import CONTEXT, AttentionContext, RowPrefix
from ptuning.data.encode import Template, TemplateKind
from ptuning.errors import BackboneChanged, UnsupportedModel
from ptuning.types import Config

DECODER = "decoder"  # the stack of a causal model


class BackboneConfig(Config):
    name: str = Field(
        "smollm2", description="alias `smollm2`, a directory, a hub id or a .gguf file"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="weights' dtype; auto measures which is fastest on this machine"
    )
    attention: Literal["auto", "eager", "sdpa"] = Field(
        "auto", description="attention kernel; auto is eager on a CPU (faster backward), else sdpa"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, …")
    sharding: Literal["replicate", "zero3"] = Field(
        "replicate",
        description="replicate: every worker holds all weights; zero3: DeepSpeed shards them",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, slower"
    )


@dataclass(frozen=True, kw_only=True)
class StackFacts:
    """One stack of attention layers that takes a prefix: L, H and D."""

    layers: int
    heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a method must know of a backbone. `hidden_size` is E."""

    stacks: dict[str, StackFacts]
    hidden_size: int
    vocab_size: int
    max_positions: int | None

    def kv_shape(self, stack: str, num_virtual_tokens: int) -> tuple[int, ...]:
        """`(L, 2, H, P, D)` of one prefix on one stack."""
        facts = self.stacks[stack]
        return (facts.layers, 2, facts.heads, num_virtual_tokens, facts.head_dim)


@dataclass(frozen=True)
class Batch:
    """One microbatch. Rows are padded on the right.

    `input_ids`, `attention_mask`: Long `[R, T]`. Supervised position n predicts `targets[n]`
    from the hidden state at `(rows[n], cols[n])`; all three are Long `[N]`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    cols: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class FrozenPass(nn.Module):
    """One forward pass of the frozen model: the only module that is ever called or sharded.

    Logits are computed where they are asked for and nowhere else: a hook on the output
    embedding picks the hidden states, so whatever a model does after it (scaling, soft caps)
    still happens.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._select: tuple[Tensor, Tensor] | None = None
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise UnsupportedModel(
                "the model has no output embedding, so it cannot predict tokens",
                seen=type(model).__name__,
                expected="a causal language model",
            )
        head.register_forward_pre_hook(self._pick)

    def _pick(self, _head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._select is None:
            return args
        rows, cols = self._select
        return (args[0][rows, cols].unsqueeze(0), *args[1:])

    def forward(
        self,
        context: AttentionContext,
        select: tuple[Tensor, Tensor] | None,
        targets: Tensor | None,
        **inputs: Any,
    ) -> Tensor:
        """nll `[N]` in nats where `targets` are given, else logits `[N, V]` or `[R, T, V]`."""
        self._select = select
        try:
            output = self.model(**inputs, **{CONTEXT: context})
        finally:
            self._select = None
        logits: Tensor = output.logits if select is None else output.logits[0]
        if targets is None:
            return logits
        return functional.cross_entropy(logits.float(), targets, reduction="none")


class Backbone:
    """A frozen causal language model with its tokenizer, template, facts and fingerprint."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str,
        fingerprint: str,
        template: TemplateKind = "auto",
        gradient_checkpointing: bool = False,
        shard: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        model.requires_grad_(False)
        model.eval()
        self.model, self.tokenizer, self.name, self.fingerprint = (
            model,
            tokenizer,
            name,
            fingerprint,
        )
        self.template = Template.of(tokenizer, template)
        whole = FrozenPass(model)
        self.runner: nn.Module = whole if shard is None else shard(whole)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        if gradient_checkpointing:
            self._checkpoint_layers()
        self.facts = self._discover()

    def _checkpoint_layers(self) -> None:
        """Checkpointing is active in training mode only; dropout must stay off, so the mode is
        set on the layers themselves, not on what they contain, and taken back inside them."""
        # The second name is that of Transformers before 5.23.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable: Any = next(getattr(self.model, name) for name in names if hasattr(self.model, name))
        enable({"use_reentrant": False})
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
                inside = partial(_checkpoint_in_eval, module)
                module._gradient_checkpointing_func = inside  # type: ignore[assignment]

    def _discover(self) -> Facts:
        """Run two tokens and note which modules attend, in which order and with which shapes.

        Reading the facts off a real pass works for every family without naming one.
        """
        context = AttentionContext(record_modules=True)
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.device)
        with torch.no_grad():
            self._call(context, ids, torch.ones_like(ids), position_offset=0)
        config = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
        shapes = {shape for call in context.calls for shape in (call.key_shape, call.value_shape)}
        if len(shapes) != 1:
            raise UnsupportedModel(
                "the model does not send its attention through Transformers' attention interface, "
                "so a prefix cannot enter it"
                if not shapes
                else "the model's keys and values have different shapes",
                seen=f"{type(self.model).__name__}, shapes (H, D): {sorted(shapes)}",
                expected="one shape in all layers, for instance Llama, Qwen, Mistral, Gemma, "
                "GPT-2, GPT-NeoX, OPT or Phi",
            )
        if not all(call.causal for call in context.calls):
            raise UnsupportedModel(
                "the model's tokens see the ones after them, so it cannot predict these",
                seen=type(self.model).__name__,
                expected="a causal language model",
            )
        for layer, call in enumerate(context.calls):
            attention.mark_layer(call.module, DECODER, layer)
        heads, head_dim = shapes.pop()
        return Facts(
            stacks={DECODER: StackFacts(layers=len(context.calls), heads=heads, head_dim=head_dim)},
            hidden_size=int(config.hidden_size),
            vocab_size=int(config.vocab_size),
            max_positions=getattr(config, "max_position_embeddings", None),
        )

    def _call(
        self,
        context: AttentionContext,
        input_ids: Tensor,
        attention_mask: Tensor | dict[str, Tensor],
        *,
        position_offset: int | Tensor,
        position_ids: Tensor | None = None,
        select: tuple[Tensor, Tensor] | None = None,
        targets: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """The seam: every call of the backbone is this line, whatever it is for."""
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "use_cache": cache is not None,
        }
        if self._takes_positions:
            if position_ids is None:
                assert isinstance(attention_mask, Tensor)
                # Real tokens start where the prefix ends; masked tokens get any valid position.
                counted = (attention_mask.cumsum(-1) - 1).clamp_min(0)
                position_ids = counted + position_offset
            inputs["position_ids"] = position_ids
        if cache is not None:
            inputs["past_key_values"] = cache
        output: Tensor = self.runner(context, select, targets, **inputs)
        self._check_prefix_entered(context)
        return output

    def _check_prefix_entered(self, context: AttentionContext) -> None:
        if context.prefix is None:
            return
        expected = {
            (stack, layer)
            for stack, layers in context.prefix.layers.items()
            for layer in range(len(layers))
        }
        if context.used != expected:
            raise UnsupportedModel(
                "the prefix did not enter every attention layer",
                seen=f"{len(context.used)} layers",
                expected=f"{len(expected)} layers",
            )

    def token_nll(self, batch: Batch, prefix: RowPrefix | None) -> Tensor:
        """Negative log-likelihood of each supervised token in nats, fp32 `[N]`.

        Differentiable with respect to the prefix; the weights never take a gradient.
        """
        context = AttentionContext(prefix=prefix)
        return self._call(
            context,
            batch.input_ids,
            batch.attention_mask,
            position_offset=0 if prefix is None else _offsets(prefix, batch.input_ids),
            select=(batch.rows, batch.cols),
            targets=batch.targets,
        )

    def capture(
        self, input_ids: Tensor, prefix: RowPrefix | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Keys and values of real tokens at positions 0..P-1: `{stack: [R, L, 2, H, P, D]}`.

        What a prefix that consists of these words would be before any training (Li and Liang
        2021, section 7.4, initialisation with activations of real words). The second value is
        one logit row: what a sharded backbone needs to run a backward pass beside its peers.
        """
        context = AttentionContext(capture=True, prefix=prefix)
        first = torch.zeros(1, dtype=torch.long, device=self.device)
        logits = self._call(
            context,
            input_ids,
            torch.ones_like(input_ids),
            position_offset=0,
            select=(first, first),
        )
        kept = {
            stack: torch.stack(
                [context.captured[(stack, layer)] for layer in range(facts.layers)], dim=1
            )
            for stack, facts in self.facts.stacks.items()
        }
        return {stack: kv.detach().float() for stack, kv in kept.items()}, logits

    def empty_prefix(self, rows: int, *, requires_grad: bool = False) -> RowPrefix:
        """A prefix of no virtual tokens: changes nothing, but can carry a gradient."""
        kv = {
            stack: torch.zeros(
                (1, *self.facts.kv_shape(stack, 0)),
                dtype=torch.float32,
                device=self.device,
                requires_grad=requires_grad,
            )
            for stack in self.facts.stacks
        }
        slots = torch.zeros(rows, dtype=torch.long, device=self.device)
        return RowPrefix.of_slots(kv, slots, self.dtype)

    def step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | dict[str, Tensor],
        position_ids: Tensor,
        prefix: RowPrefix | None,
        cache: Any,
        last: Tensor | None = None,
    ) -> Tensor:
        """Logits `[R, V]` at the last column, fp32; `cache` is updated in place.

        For generation. `attention_mask` is `[R, S+T]` over cached and new tokens (or an
        already prepared 4D mask, or one per layer type), `position_ids` `[R, T]` absolute.
        `last`, Long `[R]`, names each row's last column where rows are padded on the right.
        """
        context = AttentionContext(prefix=prefix)
        rows = torch.arange(input_ids.shape[0], device=self.device)
        if last is None:
            last = torch.full_like(rows, input_ids.shape[1] - 1)
        with torch.no_grad():
            return self._call(
                context,
                input_ids,
                attention_mask,
                position_offset=0,
                position_ids=position_ids,
                select=(rows, last),
                cache=cache,
            ).float()

    def checksum(self) -> str:
        """A digest of the weights that are in memory now (this rank's, where sharded).

        Computed anew at each call, so that two calls show whether anything changed between.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict(keep_vars=True).items()):
            held = getattr(tensor, "ds_tensor", tensor).detach()
            octets = held.contiguous().flatten().view(torch.uint8)
            words = functional.pad(octets, (0, -len(octets) % 8)).view(torch.int64)
            # A sum and a position-weighted sum of 64-bit words, exact modulo 2**64: about the
            # speed of memory, and any single changed weight changes both.
            places = torch.arange(1, len(words) + 1, dtype=torch.int64, device=words.device)
            sums = (int(words.sum()), int((words * places).sum()))
            digest.update(f"{name}:{tuple(held.shape)}:{sums}".encode())
        return digest.hexdigest()

    def verify_unchanged(self, before: str) -> None:
        """Raise BackboneChanged unless the weights are those that had checksum `before`."""
        now = self.checksum()
        if now != before:
            raise BackboneChanged(
                "the frozen weights changed while prefixes were trained",
                seen=now,
                expected=before,
                fix="discard this run's prefixes and report a bug",
            )


def _checkpoint_in_eval(layer: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Checkpoint a layer that runs, and is recomputed, in evaluation mode: some layers (OPT's)
    ask their own mode whether to drop out."""

    def run(*inputs: Any) -> Any:
        layer.training = False
        try:
            return function(*inputs)
        finally:
            layer.training = True

    return checkpoint(run, *args, use_reentrant=False)


def _offsets(prefix: RowPrefix, input_ids: Tensor) -> Tensor:
    """Each row's first real position, Long `[R, 1]`."""
    return prefix.offsets(input_ids.shape[0]).to(input_ids.device)[:, None]
