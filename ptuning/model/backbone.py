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
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from ptuning.data.encode import Template, TemplateKind
from ptuning.errors import BackboneChanged
from ptuning.model.attention import PLAN, Capture, EntryCheck, Plan, kind_of
from ptuning.model.attention_plan import (
    AttentionFacts,
    AttentionPlan,
    Tokens,
    pair_tokens,
    plan_attention,
)
from ptuning.model.batch import EMBEDDINGS, Batch, PackPrefix, RowPrefix
from ptuning.model.discover import discover
from ptuning.model.facts import DECODER, ENCODER, Facts
from ptuning.model.frozen_pass import FrozenPass
from ptuning.model.groups import stack_groups
from ptuning.model.probe import check_isolation


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
        debug: bool | None = None,
    ) -> None:
        """`debug`: hold every call to it that each attention layer took its inputs, which is
        otherwise checked once, here. None: as `PTUNING_DEBUG=1` in the environment says."""
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
            vocab_size=_embeddings_of(model),
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
        facts, self.attention = self._discover()
        self.facts = facts
        self._debug = True
        self._check_entry()
        limit = check_isolation(model).limit(facts.max_positions)
        self.facts = replace(facts, max_positions=limit)
        self._debug = os.environ.get("PTUNING_DEBUG") == "1" if debug is None else debug

    @property
    def moves_answers(self) -> bool:
        """Whether real tokens of the decoder stand behind its virtual ones. A decoder that counts
        its tokens in a way of its own (M2M100's) ignores the prefix."""
        if not self._is_encoder_decoder or self._takes_answer_positions:
            return True
        biased = any(layer.bias is not None for layer in self.attention.layers[DECODER])
        return self._whole.moves_decoder or biased

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
        """Layers are checkpointed in training mode only, and silently drop a cache then: they are
        in that mode while a gradient is wanted, themselves and not what they contain (dropout must
        stay off)."""
        layers = self._checkpointed if active else []
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def _discover(self) -> tuple[Facts, AttentionFacts]:
        def run(ids: Tensor, answer: Tensor | None) -> None:
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            if answer is not None:
                inputs["decoder_input_ids"] = answer
            with torch.no_grad():
                self.runner(AttentionPlan({}, None), None, None, 1, None, None, **inputs)

        whole = self._whole
        return discover(self.model, whole.table, whole.takes_embeddings, run, self.device)

    def _check_entry(self) -> None:
        """A tiny call with a prefix in every layer. Raises UnsupportedModel where one stays out."""
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.device)
        answers = ids if self._is_encoder_decoder else None
        mask, prefix = torch.ones_like(ids), self.empty_prefix(1)
        with torch.no_grad():
            self._run(self._plan(mask, prefix, None, answers), prefix, ids, mask, answers=answers)

    def _plan(
        self,
        mask: Tensor,
        prefix: RowPrefix | None,
        prompt_lengths: Tensor | None,
        answers: Tensor | None,
    ) -> AttentionPlan:
        """The attention of a call without a cache; `mask` is Long `[R, T]`."""
        if answers is not None:
            tokens = pair_tokens(mask, answers.shape[1])
            return plan_attention(tokens, prefix, self.attention)
        tokens = {DECODER: Tokens.of_mask(mask, mask.shape[1])}
        return plan_attention(tokens, prefix, self.attention, prompt_lengths)

    def _run(
        self,
        plan: Plan,
        prefix: RowPrefix | None,
        input_ids: Tensor | None,
        mask: Tensor | None,
        *,
        answers: Tensor | None = None,
        encoder_outputs: Any = None,
        select: tuple[Tensor, Tensor] | None = None,
        targets: Tensor | None = None,
        members: int = 1,
        cache: Any = None,
    ) -> Tensor:
        """The seam: every call of the backbone is this line, whatever it is for (but for
        `encode_source`, which calls the encoder alone and never trains)."""
        kind_of(self.model)
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "use_cache": cache is not None,
        }
        answer_positions = None
        if answers is None:
            if self._takes_positions:
                inputs["position_ids"] = plan.positions
        else:
            inputs["decoder_input_ids"] = answers
            answer_positions = self._answer_positions(plan, prefix)
            if self._takes_answer_positions and answer_positions is not None:
                inputs["decoder_position_ids"] = answer_positions
        if encoder_outputs is not None:
            inputs["encoder_outputs"] = encoder_outputs
        if cache is not None:
            inputs["past_key_values"] = cache
        virtual = None if prefix is None else prefix.embeddings
        with (
            self._entry_checked(plan) as read,
            self._checkpointing(torch.is_grad_enabled() and cache is None),
        ):
            output: Tensor = self.runner(
                read, select, targets, members, virtual, answer_positions, **inputs
            )
        return output

    @contextmanager
    def _entry_checked(self, plan: Plan) -> Iterator[Plan]:
        """In a backbone with `debug`, a plan that holds layers to reading it."""
        if not self._debug or not isinstance(plan, AttentionPlan):
            yield plan
            return
        check = EntryCheck(plan)
        yield check
        check.verify()

    def _answer_positions(self, plan: Plan, prefix: RowPrefix | None) -> Tensor | None:
        """Long `[R, S]`: an encoder-decoder model's answer begins where its decoder's prefix
        ends, as behind a cache of P keys. None: at 0, which the model does by itself."""
        if prefix is None or DECODER not in prefix.layers or plan.positions is None:
            return None
        # What pads a short answer may stand anywhere.
        limit = self.facts.max_positions
        return plan.positions if limit is None else plan.positions.clamp_max(limit - 1)

    def token_nll(self, batch: Batch, prefix: RowPrefix | None, members: int = 1) -> Tensor:
        """Negative log-likelihood of each supervised token in nats, fp32 `[N]`; of `[N / members]`
        where the batch holds the rows of an ensemble (see `Score`).

        Differentiable with respect to the prefix; the weights never take a gradient.
        """
        mask, answers = batch.attention_mask, batch.decoder_input_ids
        return self._run(
            self._plan(mask, prefix, batch.prompt_lengths, answers),
            prefix,
            batch.input_ids,
            mask,
            answers=answers,
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
        mask = torch.ones_like(input_ids)
        # The words stand at the decoder's input too: its own prefix is what they are there.
        answers = input_ids.clamp_min(0) if self._is_encoder_decoder else None
        first = torch.zeros(1, dtype=torch.long, device=self.device)
        capture = Capture(self._plan(mask, prefix, None, answers))
        logits = self._run(capture, prefix, input_ids, mask, answers=answers, select=(first, first))
        layers = {
            stack: [capture.keys_and_values[stack, layer] for layer in range(facts.layers)]
            for stack, facts in self.facts.stacks.items()
        }
        found = stack_groups(layers, self.facts, 1)
        if capture.embedded is not None:
            found[EMBEDDINGS] = capture.embedded
        return {name: values.detach().float() for name, values in found.items()}, logits

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
        tokens: Tokens,
        prefix: RowPrefix | None,
        cache: Any,
        last: Tensor | None = None,
        *,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits `[R, V]` at the last column, fp32; `cache` is updated in place.

        For generation. `tokens` says what the new ids and the key columns are, cached ones
        included. `last`, Long `[R]`, names each row's last column where rows are padded on the
        right.
        """
        rows = torch.arange(input_ids.shape[0], device=self.device)
        if last is None:
            last = torch.full_like(rows, input_ids.shape[1] - 1)
        with torch.no_grad():
            plan = plan_attention({DECODER: tokens}, prefix, self.attention, prompt_lengths)
            return self._run(
                plan, prefix, input_ids, tokens.real, select=(rows, last), cache=cache
            ).float()

    def encode_source(
        self, input_ids: Tensor, attention_mask: Tensor, prefix: RowPrefix | None
    ) -> Tensor:
        """Hidden states `[R, T, E]` of an encoder-decoder model's encoder, for `answer_step`."""
        kind_of(self.model)
        tokens = {ENCODER: Tokens.of_columns(attention_mask.shape[1], attention_mask)}
        plan = plan_attention(tokens, prefix, self.attention)
        encoder: Any = self.model.get_encoder()  # type: ignore[operator]
        with torch.no_grad(), self._entry_checked(plan) as read:
            embedded = self._whole.embed(input_ids, None if prefix is None else prefix.embeddings)
            output = encoder(inputs_embeds=embedded, attention_mask=attention_mask, **{PLAN: read})
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
        tokens = pair_tokens(attention_mask, decoder_input_ids.shape[1])
        del tokens[ENCODER]
        with torch.no_grad():
            return self._run(
                plan_attention(tokens, prefix, self.attention),
                prefix,
                None,
                attention_mask,
                answers=decoder_input_ids,
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
                select=(rows, last),
            ).float()

    def checksum(self) -> str:
        """A digest of the weights that are in memory now (this rank's, where sharded).

        Computed anew at each call, so that two calls show whether anything changed between.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict(keep_vars=True).items()):
            weights = getattr(tensor, "ds_tensor", tensor).detach()
            digest.update(f"{name}:{tuple(weights.shape)}:{_sums(weights)}".encode())
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


def _embeddings_of(model: Any) -> int | None:
    """How many token ids the input embedding has rows for."""
    rows: int | None = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return rows


_CHUNK = 1 << 24  # 64-bit words that a checksum reads at once


def _sums(weights: Tensor) -> tuple[int, int]:
    """A sum and a position-weighted sum of a tensor's 64-bit words, exact modulo 2**64: about the
    speed of memory, and any single changed weight changes both. Read in chunks, since a large
    embedding table has no room for copies of itself."""
    octets = weights.contiguous().flatten().view(torch.uint8)
    plain = weighted = 0
    for start in range(0, max(1, len(octets)), 8 * _CHUNK):
        chunk = octets[start : start + 8 * _CHUNK]
        if len(chunk) % 8:
            chunk = functional.pad(chunk, (0, -len(chunk) % 8))
        words = chunk.view(torch.int64)
        first = start // 8 + 1
        places = torch.arange(first, first + len(words), dtype=torch.int64, device=words.device)
        plain += int(words.sum())
        weighted += int((words * places).sum())
    return plain % 2**64, weighted % 2**64


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
