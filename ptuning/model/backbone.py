"""The frozen language model: loaded once, never changed, called through one seam.

All other code uses `Backbone`. Every call but `encode_source` goes through `_run` and the single
module of frozen_pass.py, which DeepSpeed can shard.

No code names a model family. Where models differ in more than shapes, the difference is detected,
by discover.py at load time and in these places:

    whether a causal model or a decoder accepts position ids (`_takes_positions`,
    `_takes_answer_positions`), and if not, how an answer's positions move (`moves_answers`)
    layers that check `self.training` for dropout themselves (`_checkpoint_in_eval`): OPT
    decoders that compute their own positions (frozen_pass.py, `_decoder_positions`): BART
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
from ptuning.model.attention import PLAN, Capture, EntryCheck, Plan, read_attention_kind
from ptuning.model.attention_plan import (
    AttentionFacts,
    AttentionPlan,
    Tokens,
    pair_tokens,
    plan_attention,
)
from ptuning.model.batch import EMBEDDINGS, Batch, PackPrefix, RowPrefix
from ptuning.model.discover import discover_facts
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
        """`debug`: check on every call that each attention layer read its inputs; otherwise this
        is checked once, here. None: on if `PTUNING_DEBUG=1` is set in the environment."""
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
        self._frozen_pass = FrozenPass(model, always_embed=shard is not None)
        self.runner: nn.Module = self._frozen_pass if shard is None else shard(self._frozen_pass)
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
        """Whether the decoder's real tokens are positioned after its virtual ones. A decoder that
        computes positions internally (M2M100's) ignores the prefix length."""
        if not self._is_encoder_decoder or self._takes_answer_positions:
            return True
        biased = any(layer.bias is not None for layer in self.attention.layers[DECODER])
        return self._frozen_pass.moves_decoder or biased

    def _checkpoint_layers(self) -> None:
        # Transformers before 5.23 uses the second name.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable: Any = next(getattr(self.model, name) for name in names if hasattr(self.model, name))
        enable({"use_reentrant": False})
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                run_in_eval = partial(_checkpoint_in_eval, module)
                module._gradient_checkpointing_func = run_in_eval  # type: ignore[assignment]
                self._checkpointed.append(module)

    @contextmanager
    def _checkpointing(self, active: bool) -> Iterator[None]:
        """Put the checkpointed layers, but not their submodules, into training mode.

        Transformers checkpoints in training mode only, and then silently drops the cache, so the
        mode is on only while gradients are needed. The submodules stay in evaluation mode to keep
        dropout off.
        """
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

        frozen_pass = self._frozen_pass
        return discover_facts(
            self.model, frozen_pass.table, frozen_pass.takes_embeddings, run, self.device
        )

    def _check_entry(self) -> None:
        """Make a tiny call with a prefix in every layer. Raises UnsupportedModel if a layer does
        not read it."""
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
        """Plan the attention of a call without a cache; `mask` is Long `[R, T]`."""
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
        """The seam: every call of the backbone goes through here, except `encode_source`, which
        calls the encoder alone and never trains."""
        read_attention_kind(self.model)
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
        """With `debug`, check that every layer reads the plan."""
        if not self._debug or not isinstance(plan, AttentionPlan):
            yield plan
            return
        check = EntryCheck(plan)
        yield check
        check.verify()

    def _answer_positions(self, plan: Plan, prefix: RowPrefix | None) -> Tensor | None:
        """Positions of an encoder-decoder model's answer, Long `[R, S]`: they start after the
        decoder's prefix, as after a cache of P keys. None: they start at 0, the model's default."""
        if prefix is None or DECODER not in prefix.layers or plan.positions is None:
            return None
        # The padding of short answers may get any valid position.
        limit = self.facts.max_positions
        return plan.positions if limit is None else plan.positions.clamp_max(limit - 1)

    def token_nll(self, batch: Batch, prefix: RowPrefix | None, members: int = 1) -> Tensor:
        """Negative log-likelihood of each supervised token in nats, fp32 `[N]`, or `[N / members]`
        if the batch repeats its rows for the members of an ensemble (see `Score`).

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
        """The activations of some tokens: keys and values of all layers by group (as in PackPrefix,
        with R in place of U) at positions 0..P-1, and `embeddings` `[R, P, E]` if the model accepts
        input embeddings; fp32.

        These initialise a prefix from real words (Li and Liang 2021, section 7.4). For virtual
        tokens (negative ids) they are the keys and values that the tokens have in every layer. The
        second value is one row of logits, which a sharded backbone needs to run a backward pass
        together with its peers.
        """
        mask = torch.ones_like(input_ids)
        # The decoder reads the same ids: its part of the prefix is their activations there.
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
        tokens.

        On a causal stack virtual tokens attend only to one another, so their keys and values do
        not depend on what follows and one pass computes them for all prompts.
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
        """A prefix that changes nothing but can carry a gradient: it has no keys and values, and
        no row refers to its input embedding.

        `shapes` are a method's (`Method.shapes`); None: keys and values in every layer.
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
        """One generation step: logits `[R, V]` at the last column, fp32; updates `cache` in place.

        `tokens` describes the new ids and the key columns, cached columns included. `last`, Long
        `[R]`, is each row's last column if rows are padded on the right.
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
        read_attention_kind(self.model)
        tokens = {ENCODER: Tokens.of_columns(attention_mask.shape[1], attention_mask)}
        plan = plan_attention(tokens, prefix, self.attention)
        encoder: Any = self.model.get_encoder()  # type: ignore[operator]
        with torch.no_grad(), self._entry_checked(plan) as read:
            embedded = self._frozen_pass.embed(
                input_ids, None if prefix is None else prefix.embeddings
            )
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
        """Logits `[R, V]` at column `last[r]` of each row's answer so far, fp32, given the
        encoder's hidden states. Nothing is cached: each step reads the full answer again."""
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
        """A digest of the weights in memory (of this rank's shard, if sharded).

        Each call recomputes it, so comparing two calls shows whether the weights changed.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict(keep_vars=True).items()):
            weights = getattr(tensor, "ds_tensor", tensor).detach()
            digest.update(f"{name}:{tuple(weights.shape)}:{_sums(weights)}".encode())
        return digest.hexdigest()

    def verify_unchanged(self, before: str) -> None:
        """Raise BackboneChanged unless the weights still have the checksum `before`."""
        now = self.checksum()
        if now != before:
            raise BackboneChanged(
                "the frozen weights changed while prefixes were trained",
                seen=now,
                expected=before,
                fix="discard this run's prefixes and report a bug",
            )


def _embeddings_of(model: Any) -> int | None:
    """The number of rows of the input embedding."""
    rows: int | None = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return rows


_CHUNK = 1 << 24  # 64-bit words that a checksum reads at once


def _sums(weights: Tensor) -> tuple[int, int]:
    """A sum and a position-weighted sum of a tensor's 64-bit words, exact modulo 2**64.

    It runs at about memory speed, and any single changed weight changes both sums. The tensor is
    read in chunks because there may be no memory for a copy of a large embedding table.
    """
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
    """Checkpoint a layer, and run and recompute it in evaluation mode: some layers (OPT's) apply
    dropout according to their own `training` flag."""

    def run(*inputs: Any) -> Any:
        mode, layer.training = layer.training, False
        try:
            return function(*inputs)
        finally:
            layer.training = mode

    return checkpoint(run, *args, use_reentrant=False)
