"""Prefixes made ready to answer with: what generation and the service put into the model.

Virtual tokens at the input that come before all real ones are turned, once, into the keys and
values that they are in every layer; others stay embeddings and travel with the prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptuning.data.layout import Arrangement
from ptuning.errors import BackboneError, CorruptArtifact, DataError
from ptuning.model.backbone import Backbone
from ptuning.model.batch import EMBEDDINGS, Layers, RowPrefix, Visibility, split_layers
from ptuning.prefix.artifact import Prefix


@dataclass(frozen=True)
class Member:
    """One prefix of an ensemble, in the backbone's dtype and on its device.

    `kv[stack]` `[K, 2, H, P, D]`, or `embeddings` `[P, E]`.
    """

    kv: dict[str, Tensor]
    embeddings: Tensor | None
    visibility: Visibility

    @property
    def length(self) -> int:
        """P, the columns of its keys and values; 0 where it is at the input."""
        return int(next(iter(self.kv.values())).shape[-2]) if self.kv else 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors)

    @property
    def finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in self._tensors)

    @property
    def _tensors(self) -> list[Tensor]:
        return [*self.kv.values(), *([] if self.embeddings is None else [self.embeddings])]


@dataclass(frozen=True)
class ReadyPrefix:
    """A user's prefix as the model takes it. `around` is what stands around a prompt's ids."""

    members: tuple[Member, ...]
    around: Arrangement = field(default_factory=Arrangement)
    combine: str = "mean"

    @property
    def voices(self) -> int:
        """How many answers are made, of which one is given: each member's where they vote."""
        return len(self.members) if self.combine == "vote" else 1

    @property
    def length(self) -> int:
        return self.members[0].length

    @property
    def nbytes(self) -> int:
        return sum(member.nbytes for member in self.members)


def check_positions(
    backbone: Backbone, ready: ReadyPrefix | None, prompt: Sequence[int], answer: int
) -> None:
    """Raise DataError unless a prompt (its virtual tokens included) and `answer` more tokens fit
    the backbone's positions."""
    limit = backbone.facts.max_positions
    kv = {} if ready is None else ready.members[0].kv
    shapes = {stack: values.shape for stack, values in kv.items()}
    needed = backbone.facts.positions(len(prompt), answer, shapes)
    if limit is not None and needed > limit:
        raise DataError(
            "the backbone has too few positions",
            seen=f"{needed}: {len(prompt)} tokens of prompt, {answer} of answer, and "
            f"{ready.length if ready else 0} virtual ones",
            expected=f"at most {limit} positions",
            fix="shorten the prompt or ask for fewer tokens",
        )


def make_ready(prefix: Prefix, backbone: Backbone) -> ReadyPrefix:
    """Check a prefix against the backbone and prepare it. Raises an ArtifactError."""
    prefix.check(backbone)
    around = prefix.arrangement(backbone.template)
    facts = backbone.facts
    compiles = facts.decoder_start_id is None and facts.front_stays and around.in_front > 0
    members = []
    for tensors in prefix.members:
        own = {name: values.to(backbone.device) for name, values in tensors.items()}
        embeddings = own.pop(EMBEDDINGS, None)
        if embeddings is not None and compiles:
            (stack,) = facts.stacks
            own = {stack: backbone.keys_and_values(embeddings[None])[0]}
            embeddings = None
        member = Member(
            {stack: kv.to(backbone.dtype) for stack, kv in own.items()},
            None if embeddings is None else embeddings.to(backbone.dtype),
            prefix.seen,
        )
        if not member.finite:
            raise CorruptArtifact(
                "the prefix has values that this backbone's numbers cannot hold",
                seen=f"values that are not finite, once they are {backbone.dtype}",
                fix="train it again, with a lower learning rate",
            )
        members.append(member)
    return ReadyPrefix(
        tuple(members), around.without_front() if compiles else around, prefix.combine
    )


def rows_of(
    backbone: Backbone, members: Sequence[Member | None], *, cached: bool = False
) -> RowPrefix | None:
    """One batch's prefixes, padded on the left to the longest; None where no row has one.

    `cached`: their keys and values lie in the first columns of a cache already. What depends on
    lengths and depths is decided here, on the host, so that a forward pass reads nothing back.
    """
    if not any(member is not None for member in members):
        return None
    device = backbone.device
    lengths = [0 if member is None else member.length for member in members]
    ragged = cached or len(set(lengths)) > 1
    infix = [member is not None and member.visibility.infix for member in members]
    windowed = [member is not None and member.visibility.windowed for member in members]
    return RowPrefix(
        {} if cached else _layers(backbone, members, max(lengths)),
        lengths=torch.tensor(lengths, device=device) if ragged else None,
        embeddings=_embeddings(backbone, members),
        infix=torch.tensor(infix, device=device) if any(infix) else None,
        windowed=torch.tensor(windowed, device=device) if any(windowed) else None,
        depths=_depths(backbone, members, cached),
    )


def _depths(
    backbone: Backbone, members: Sequence[Member | None], cached: bool
) -> dict[str, Tensor]:
    """How many layers of each stack each row's prefix has, for stacks where rows differ; in a
    cache, where some do not have all, since its columns are there in every layer."""
    depths = {}
    for stack, facts in backbone.facts.stacks.items():
        own = [0 if member is None else len(member.kv.get(stack, ())) for member in members]
        with_columns = {n for n, member in zip(own, members, strict=True) if member and member.kv}
        differ = bool(with_columns - {facts.layers}) if cached else len(set(own)) > 1
        if differ:
            depths[stack] = torch.tensor(own, device=backbone.device)
    return depths


def _layers(backbone: Backbone, members: Sequence[Member | None], length: int) -> dict[str, Layers]:
    layers = {}
    for stack in backbone.facts.stacks:
        own = [None if member is None else member.kv.get(stack) for member in members]
        depth = max((len(kv) for kv in own if kv is not None), default=0)
        if not depth:
            continue
        shape = backbone.facts.kv_shape(stack, length, depth)
        rows = torch.zeros((len(members), *shape), dtype=backbone.dtype, device=backbone.device)
        for row, kv in enumerate(own):
            if kv is not None:
                rows[row, depth - len(kv) :, ..., length - kv.shape[-2] :, :] = kv
        layers[stack] = split_layers(rows)
    return layers


def _embeddings(backbone: Backbone, members: Sequence[Member | None]) -> Tensor | None:
    own = [None if member is None else member.embeddings for member in members]
    longest = max((len(values) for values in own if values is not None), default=0)
    if not longest:
        return None
    shape = (len(members), longest, backbone.facts.hidden_size)
    rows = torch.zeros(shape, dtype=backbone.dtype, device=backbone.device)
    for row, values in enumerate(own):
        if values is not None:
            rows[row, : len(values)] = values
    return rows


def combine_logits(logits_MV: Tensor) -> Tensor:
    """One row of logits `[V]` of what speaks with one voice: its only member's, or the mean of
    the members' log-probabilities. Raises BackboneError where they are not finite."""
    if len(logits_MV) == 1:
        logits_V = logits_MV[0]
    else:
        logits_V = torch.log_softmax(logits_MV.float(), dim=-1).mean(0)
    if not math.isfinite(largest := float(logits_V.max())):  # NaN wins a maximum
        raise BackboneError(
            "the model's logits are not finite", seen=largest, fix="look at the prompt's prefix"
        )
    return logits_V


def pick_winner(answers: Sequence[tuple[str, float]]) -> int:
    """Which of an ensemble's answers (text, log-probability per token by who gave it) is given:
    the commonest (Lester et al. 2021, section 6), among equally common ones the likeliest."""
    votes = Counter(text for text, _ in answers)
    return max(range(len(answers)), key=lambda n: (votes[answers[n][0]], answers[n][1], -n))


def log_probability(logits_V: Tensor, token: int) -> float:
    """Of `token`, in nats."""
    return float(torch.log_softmax(logits_V.float(), dim=-1)[token])
