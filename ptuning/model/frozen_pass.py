"""One forward pass of the frozen model, as the only module that is called or sharded."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptuning.errors import UnsupportedModel
from ptuning.model.attention import PLAN, Capture, Plan


class FrozenPass(nn.Module):
    """The frozen model, wrapped with what a prefix needs.

    Logits are computed only at the selected positions. A hook on the output embedding selects the
    hidden states, so that everything the model does after it (scaling, soft caps) still applies.
    """

    def __init__(self, model: nn.Module, *, always_embed: bool = False) -> None:
        """`always_embed`: look up embeddings here in every call, so that all ranks of a sharded
        model visit its modules in the same order, whatever each computes."""
        super().__init__()
        self._always_embed = always_embed
        self.model = model
        self.takes_embeddings = "inputs_embeds" in inspect.signature(model.forward).parameters
        # Thread-local: a service may compile a prefix while its engine runs a step.
        self._local = threading.local()
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise UnsupportedModel(
                "the model has no output embedding, so it cannot predict tokens",
                seen=type(model).__name__,
                expected="a causal language model",
            )
        head.register_forward_pre_hook(self._pick)
        self.moves_decoder = False
        for table in _decoder_positions(model):
            table.register_forward_pre_hook(self._at_positions, with_kwargs=True)
            table.register_forward_hook(self._by_rows)
            self.moves_decoder = True

    def _pick(self, _head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        select = getattr(self._local, "select", None)
        if select is None:
            return args
        rows, cols = select
        return (args[0][rows, cols].unsqueeze(0), *args[1:])

    def _at_positions(
        self, table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pass our positions to a decoder that computes its own. They are flattened into one row,
        because such a decoder has one list of positions for all rows of a batch and ours differ."""
        positions = getattr(self._local, "answer_positions", None)
        if positions is None:
            return None
        bound = inspect.signature(table.forward).bind(*args, **kwargs)
        bound.arguments["position_ids"] = positions.flatten()
        return bound.args, bound.kwargs

    def _by_rows(self, _table: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        positions = getattr(self._local, "answer_positions", None)
        return output if positions is None else output.view(*positions.shape, -1)

    def forward(
        self,
        plan: Plan,
        select: tuple[Tensor, Tensor] | None,
        targets: Tensor | None,
        members: int,
        virtual: Tensor | None,
        answer_positions: Tensor | None,
        **inputs: Any,
    ) -> Tensor:
        """nll `[N]` in nats if `targets` are given, otherwise logits `[N, V]` or `[R, T, V]`.

        With `members` > 1 the batch repeats its rows once per ensemble member, member by member,
        and the nll is the ensemble's, `[N / members]`. `virtual`, `[R, P, E]`, are the embeddings
        of negative ids.
        """
        ids = inputs["input_ids"]  # None if the encoder has already read them
        here = isinstance(plan, Capture) or self._always_embed
        if ids is not None and (virtual is not None or (here and self.takes_embeddings)):
            # The model must not look them up again: all ranks of a sharded model must make the
            # same number of lookups.
            inputs["input_ids"] = None
            inputs["inputs_embeds"] = self.embed(ids, virtual)
            if isinstance(plan, Capture):
                plan.embedded = inputs["inputs_embeds"]
        self._local.select, self._local.answer_positions = select, answer_positions
        try:
            output = self.model(**inputs, **{PLAN: plan})
        finally:
            self._local.select = self._local.answer_positions = None
        logits: Tensor = output.logits if select is None else output.logits[0]
        if targets is None:
            return logits
        if members > 1:
            return _ensemble_nll(logits, targets, members)
        return functional.cross_entropy(logits.float(), targets, reduction="none")

    @property
    def table(self) -> nn.Module:
        """The input embedding: the encoder's if there is one (the decoder may have another)."""
        model: Any = self.model
        reader = model.get_encoder() if model.config.is_encoder_decoder else model
        table: nn.Module = reader.get_input_embeddings()
        return table

    def embed(self, ids: Tensor, virtual: Tensor | None) -> Tensor:
        """Input embeddings `[R, T, E]`; id -1-k in row r is `virtual[r, k]`."""
        real: Tensor = self.table(ids.clamp_min(0))
        if virtual is None:
            return real
        index = (-1 - ids).clamp_min(0)[..., None].expand(-1, -1, virtual.shape[-1])
        gathered = virtual.gather(1, index).to(real.dtype)
        return torch.where((ids < 0)[..., None], gathered, real)


def _decoder_positions(model: Any) -> list[nn.Module]:
    """The position embeddings of a decoder (BART's and similar) that accept positions, though the
    model's `forward` does not."""
    if not model.config.is_encoder_decoder:
        return []
    encoder = set(model.get_encoder().modules())
    return [
        module
        for module in model.get_decoder().modules()
        if isinstance(module, nn.Embedding)
        and module not in encoder
        and "position_ids" in inspect.signature(module.forward).parameters
    ]


def _ensemble_nll(logits_NV: Tensor, targets: Tensor, members: int) -> Tensor:
    """-log of the normalised geometric mean of the members' probabilities, `[N / members]`."""
    log_p = functional.log_softmax(logits_NV.float(), dim=-1).unflatten(0, (members, -1)).mean(0)
    wanted = targets[: len(log_p), None]
    return log_p.logsumexp(-1) - log_p.gather(-1, wanted)[:, 0]
