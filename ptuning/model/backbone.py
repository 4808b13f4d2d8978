"""The frozen language model: loaded once, never changed, called through one seam.

`Backbone` is what everything else talks to. Its three calls (`token_nll`, `capture`,
`step`) all go through one module, frozen_pass.py's, which DeepSpeed can shard.

No code names a family. Where models differ in more than shapes, the difference is looked for,
by discover.py when a model is loaded, and:

    whether positions may be given, to a causal model or to a decoder, here (`_takes_positions`,
    `_takes_answer_positions`), and what else tells an answer where it begins (`moves_answers`)
    layers that drop out by a mode of their own, here (`_checkpoint_in_eval`): OPT
    decoders that count their tokens themselves (frozen_pass.py, `_decoder_positions`): BART
    the order in which PEFT reads a decoder's layers (peft_format.py, `_read_by_pairs`)
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from ptuning.data.encode import Template, TemplateKind
from ptuning.errors import BackboneChanged, UnsupportedModel
from ptuning.model import attention
from ptuning.model.attention import CONTEXT, AttentionContext
from ptuning.model.batch import EMBEDDINGS, Batch, CachedPrefix, PackPrefix, RowPrefix
from ptuning.model.discover import discover
from ptuning.model.facts import CROSS, DECODER, ENCODER, Facts
from ptuning.model.frozen_pass import FrozenPass
from ptuning.model.groups import stack_groups


class Backbone:
    """A frozen language model, causal or with an encoder, with its tokenizer, template, facts and
    fingerprint."""

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
        self.template = Template.of(
            tokenizer,
            template,
            encoder_decoder=bool(model.config.is_encoder_decoder),  # type: ignore[union-attr]
        )
        self._whole = FrozenPass(model, always_embed=shard is not None)
        self.runner: nn.Module = self._whole if shard is None else shard(self._whole)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
        arguments = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in arguments
        self._takes_answer_positions = "decoder_position_ids" in arguments
        self._checkpointed: list[nn.Module] = []
        if gradient_checkpointing:
            self._checkpoint_layers()
        self.facts = self._discover()

    @property
    def moves_answers(self) -> bool:
        """Whether real tokens of the decoder stand behind its virtual ones. A decoder that counts
        its tokens in a way of its own (M2M100's) does not hear of them."""
        if not self._is_encoder_decoder or self._takes_answer_positions:
            return True
        places = (attention.place_of(module) for module in self.model.modules())
        return self._whole.moves_decoder or any(
            place.before is not None for place in places if place and place.stack == DECODER
        )

    def _checkpoint_layers(self) -> None:
        # The second name is that of Transformers before 5.23.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable: Any = next(getattr(self.model, name) for name in names if hasattr(self.model, name))
        enable({"use_reentrant": False})
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                inside = partial(_checkpoint_in_eval, module)
                module._gradient_checkpointing_func = inside  # type: ignore[assignment]
                self._checkpointed.append(module)

    @contextmanager
    def _checkpointing(self, active: bool) -> Iterator[None]:
        """Layers are checkpointed in training mode only, and drop a cache then without a word:
        they are in that mode while a gradient is wanted, themselves and not what they contain
        (dropout must stay off)."""
        layers = self._checkpointed if active else []
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def _discover(self) -> Facts:
        def run(context: AttentionContext, ids: Tensor, answer: Tensor | None) -> None:
            with torch.no_grad():
                self._call(context, ids, torch.ones_like(ids), decoder_input_ids=answer)

        return discover(self.model, self._whole, run, self.device)

    def _call(
        self,
        context: AttentionContext,
        input_ids: Tensor | None,
        attention_mask: Tensor | dict[str, Tensor],
        *,
        index: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        select: tuple[Tensor, Tensor] | None = None,
        targets: Tensor | None = None,
        members: int = 1,
        cache: Any = None,
    ) -> Tensor:
        """The seam: every call of the backbone is this line, whatever it is for (but for
        `encode_source`, which calls the encoder alone and never trains).

        `index` (see AttentionContext) is counted from the mask where it is not given. An
        encoder-decoder model needs none: its rows are padded on the right, so columns count.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "use_cache": cache is not None,
        }
        if not self._is_encoder_decoder:
            if index is None:
                assert isinstance(attention_mask, Tensor)
                # Masked tokens get any valid position.
                index = (attention_mask.cumsum(-1) - 1).clamp_min(0)
            context.index = index
            if context.prefix is not None and prompt_lengths is not None:
                context.after = context.prefix.after(prompt_lengths)
            if self._takes_positions:
                inputs["position_ids"] = context.positions()
        if decoder_input_ids is not None:
            inputs["decoder_input_ids"] = decoder_input_ids
            if context.prefix is not None and DECODER in context.prefix.layers:
                positions = self._answer_positions(context.prefix, decoder_input_ids)
                context.answer_positions = positions
                if self._takes_answer_positions:
                    inputs["decoder_position_ids"] = positions
        if encoder_outputs is not None:
            inputs["encoder_outputs"] = encoder_outputs
        if cache is not None:
            inputs["past_key_values"] = cache
        with self._checkpointing(torch.is_grad_enabled() and cache is None):
            output: Tensor = self.runner(context, select, targets, members, **inputs)
        # With the encoder's states at hand only the decoder's two stacks were called.
        stacks = (DECODER, CROSS) if encoder_outputs is not None else (DECODER, ENCODER, CROSS)
        self._check_prefix_entered(context, stacks)
        return output

    def _answer_positions(self, prefix: RowPrefix, answers: Tensor) -> Tensor:
        """Long `[R, S]`: an encoder-decoder model's answer begins where its decoder's prefix
        ends, as behind a cache of P keys."""
        rows, length = answers.shape
        moved = prefix.offsets(rows).to(self.device)
        if DECODER in prefix.depths:
            moved = moved * (prefix.depths[DECODER] > 0)
        positions = torch.arange(length, device=self.device) + moved[:, None]
        # What pads a short answer may stand anywhere.
        limit = self.facts.max_positions
        return positions if limit is None else positions.clamp_max(limit - 1)

    def _check_prefix_entered(self, context: AttentionContext, stacks: tuple[str, ...]) -> None:
        if context.prefix is None:
            return
        expected = {
            (stack, self.facts.stacks[stack].layers - 1 - below_top)
            for stack, layers in context.prefix.layers.items()
            for below_top in range(len(layers))
            if stack in stacks
        }
        if context.used != expected:
            raise UnsupportedModel(
                "the prefix did not enter every attention layer",
                seen=f"{len(context.used)} layers",
                expected=f"{len(expected)} layers",
            )

    def token_nll(self, batch: Batch, prefix: RowPrefix | None, members: int = 1) -> Tensor:
        """Negative log-likelihood of each supervised token in nats, fp32 `[N]`; of `[N / members]`
        where the batch holds the rows of an ensemble (see `Score`).

        Differentiable with respect to the prefix; the weights never take a gradient.
        """
        return self._call(
            AttentionContext(prefix=prefix),
            batch.input_ids,
            batch.attention_mask,
            prompt_lengths=batch.prompt_lengths,
            decoder_input_ids=batch.decoder_input_ids,
            select=(batch.rows, batch.cols),
            targets=batch.targets,
            members=members,
        )

    def capture(
        self, input_ids: Tensor, prefix: RowPrefix | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What tokens are inside the model: keys and values of all layers by group (as PackPrefix
        has them, with R in place of U) at positions 0..P-1, and `embeddings` `[R, P, E]` where the
        model takes such; fp32.

        What a prefix that consists of these words would be before any training (Li and Liang
        2021, section 7.4, initialisation with activations of real words); of virtual tokens
        (negative ids), what they are in every layer. The second value is one logit row: what a
        sharded backbone needs to run a backward pass beside its peers.
        """
        context = AttentionContext(capture=True, prefix=prefix)
        first = torch.zeros(1, dtype=torch.long, device=self.device)
        logits = self._call(
            context,
            input_ids,
            torch.ones_like(input_ids),
            # The words stand at the decoder's input too: its own prefix is what they are there.
            decoder_input_ids=input_ids.clamp_min(0) if self._is_encoder_decoder else None,
            select=(first, first),
        )
        layers = {
            stack: [context.captured[(stack, layer)] for layer in range(facts.layers)]
            for stack, facts in self.facts.stacks.items()
        }
        kept = stack_groups(layers, self.facts, 1)
        if context.embedded is not None:
            kept[EMBEDDINGS] = context.embedded
        return {name: values.detach().float() for name, values in kept.items()}, logits

    def keys_and_values(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Keys and values (see `capture`) of virtual tokens `[R, P, E]` that come before all real
        ones.

        On a causal stack they see one another and nothing else, so one pass says for good what
        they are in every layer.
        """
        rows, length, _ = embeddings.shape
        ids = torch.arange(-1, -1 - length, -1, device=self.device).expand(rows, -1)
        prefix = RowPrefix({}, embeddings=embeddings.to(self.device, self.dtype))
        with torch.no_grad():
            captured = self.capture(ids, prefix)[0]
        return {name: values for name, values in captured.items() if name != EMBEDDINGS}

    def empty_prefix(
        self,
        rows: int,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        requires_grad: bool = False,
    ) -> RowPrefix:
        """A prefix that changes nothing, but can carry a gradient: no virtual tokens inside, and
        none of those at the input stands anywhere.

        `shapes` are a method's (`Method.shapes`); None: on every layer of every stack.
        """
        tensors = {}
        for name, shape in (shapes or self.facts.kv_shapes(0)).items():
            none = (1, shape[-1]) if name == EMBEDDINGS else (*shape[:2], 0, shape[3])
            tensors[name] = torch.zeros(
                (1, *none), dtype=torch.float32, device=self.device, requires_grad=requires_grad
            )
        slots = torch.zeros(rows, dtype=torch.long, device=self.device)
        return PackPrefix(tensors, self.facts).of_rows(slots, self.dtype)

    def step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | dict[str, Tensor],
        index: Tensor,
        prefix: RowPrefix | None,
        cache: Any,
        last: Tensor | None = None,
        *,
        prompt_lengths: Tensor | None = None,
        cached: CachedPrefix | None = None,
    ) -> Tensor:
        """Logits `[R, V]` at the last column, fp32; `cache` is updated in place.

        For generation. `attention_mask` is `[R, S+T]` over cached and new tokens (or an
        already prepared 4D mask, or one per layer type), `index` `[R, T]` each new token's
        number among its row's real tokens, or its position where a prefix is `cached`.
        `last`, Long `[R]`, names each row's last column where rows are padded on the right.
        """
        context = AttentionContext(prefix=prefix, cached=cached)
        rows = torch.arange(input_ids.shape[0], device=self.device)
        if last is None:
            last = torch.full_like(rows, input_ids.shape[1] - 1)
        with torch.no_grad():
            return self._call(
                context,
                input_ids,
                attention_mask,
                index=index,
                prompt_lengths=prompt_lengths,
                select=(rows, last),
                cache=cache,
            ).float()

    def encode_source(
        self, input_ids: Tensor, attention_mask: Tensor, prefix: RowPrefix | None
    ) -> Tensor:
        """Hidden states `[R, T, E]` of an encoder-decoder model's encoder, for `answer_step`."""
        context = AttentionContext(prefix=prefix)
        encoder: Any = self.model.get_encoder()  # type: ignore[operator]
        with torch.no_grad():
            embedded = self._whole.embed(input_ids, None if prefix is None else prefix.embeddings)
            output = encoder(
                inputs_embeds=embedded, attention_mask=attention_mask, **{CONTEXT: context}
            )
        self._check_prefix_entered(context, (ENCODER,))
        hidden: Tensor = output.last_hidden_state
        return hidden

    def answer_step(
        self,
        encoded: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        prefix: RowPrefix | None,
        last: Tensor,
    ) -> Tensor:
        """Logits `[R, V]` at column `last[r]` of each row's answer so far, fp32, with the
        encoder's hidden states at hand. Nothing is cached: the plain way."""
        rows = torch.arange(decoder_input_ids.shape[0], device=self.device)
        with torch.no_grad():
            return self._call(
                AttentionContext(prefix=prefix),
                None,
                attention_mask,
                decoder_input_ids=decoder_input_ids,
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
                select=(rows, last),
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
        mode, layer.training = layer.training, False
        try:
            return function(*inputs)
        finally:
            layer.training = mode

    return checkpoint(run, *args, use_reentrant=False)
