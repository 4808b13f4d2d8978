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
from ptuning.model.batch import EMBEDDINGS, RowPrefix, Visibility
from ptuning.model.facts import DECODER
from ptuning.model.groups import Layers, split_groups
from ptuning.prefix.artifact import Prefix


@dataclass(frozen=True)
class Member:
    """One prefix of an ensemble, in the backbone's dtype and on its device.

    `layers[stack]` are the keys `[H, P, Dk]` and values `[H, P, Dv]` of the stack's top K layers;
    or `embeddings` `[P, E]`.
    """

    layers: dict[str, Layers]
    embeddings: Tensor | None = None
    visibility: Visibility = field(default_factory=Visibility)

    @property
    def length(self) -> int:
        """P, the columns of its keys and values; 0 where it is at the input."""
        return max((self.length_in(stack) for stack in self.layers), default=0)

    def length_in(self, stack: str) -> int:
        """P in one stack; 0 where it has nothing there."""
        layers = self.layers.get(stack)
        return int(layers[0][0].shape[-2]) if layers else 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors)

    @property
    def finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in self._tensors)

    @property
    def _tensors(self) -> list[Tensor]:
        inside = [p for layers in self.layers.values() for pair in layers for p in pair]
        return inside if self.embeddings is None else [*inside, self.embeddings]


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
    inside = 0 if ready is None else ready.members[0].length_in(DECODER)
    needed = backbone.facts.positions(len(prompt), answer, inside)
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
    around, facts = prefix.arrangement(backbone.template), backbone.facts
    compiles = facts.decoder_start_id is None and facts.front_stays and around.in_front > 0
    members = []
    for tensors in prefix.members:
        moved = {name: values.to(backbone.device) for name, values in tensors.items()}
        embeddings = moved.pop(EMBEDDINGS, None)
        if embeddings is not None and compiles:
            made = backbone.keys_and_values(embeddings[None])
            moved = {name: values[0] for name, values in made.items()}
            embeddings = None
        member = Member(
            split_groups({n: p.to(backbone.dtype) for n, p in moved.items()}, facts, 0),
            None if embeddings is None else embeddings.to(backbone.dtype),
            prefix.method.visibility,
        )
        if not member.finite:
            raise CorruptArtifact(
                "the prefix has values that this backbone's numbers cannot hold",
                seen=f"values that are not finite, once they are {backbone.dtype}",
                fix="train it again, with a lower learning rate",
            )
        members.append(member)
    return ReadyPrefix(
        tuple(members),
        around.without_front() if compiles else around,
        prefix.method.combination,
    )


def rows_of(backbone: Backbone, members: Sequence[Member | None]) -> RowPrefix | None:
    """One batch's prefixes, padded on the left to the longest; None where no row has one."""
    held = [member for member in members if member is not None]
    if not held:
        return None
    device = backbone.device
    prefix = RowPrefix(_layers(backbone, members), embeddings=_embeddings(backbone, members))
    length = prefix.length
    if length:
        own = [0 if member is None else member.length for member in members]
        lengths = torch.tensor(own, device=device)[:, None]
        columns = torch.arange(length, device=device)
        visible = columns >= length - lengths
        prefix.visible = None if bool(visible.all()) else visible
        prefix.depths = _depths(backbone, members)
    infix = [member is not None and member.visibility.infix for member in members]
    windowed = [member is not None and member.visibility.windowed for member in members]
    prefix.infix = torch.tensor(infix, device=device) if any(infix) else None
    prefix.windowed = torch.tensor(windowed, device=device) if any(windowed) else None
    return prefix


def _depths(backbone: Backbone, members: Sequence[Member | None]) -> dict[str, Tensor]:
    """How many layers of each stack each row's prefix has, for stacks where rows differ."""
    depths = {}
    for stack in backbone.facts.stacks:
        own = [0 if member is None else len(member.layers.get(stack, ())) for member in members]
        if len(set(own)) > 1:
            depths[stack] = torch.tensor(own, device=backbone.device)
    return depths


def _layers(backbone: Backbone, members: Sequence[Member | None]) -> dict[str, Layers]:
    stacked = {}
    length = max((member.length for member in members if member is not None), default=0)
    for stack in backbone.facts.stacks:
        of_rows = [() if member is None else member.layers.get(stack, ()) for member in members]
        depth = max(len(layers) for layers in of_rows)
        if depth:
            stacked[stack] = tuple(
                _layer(backbone, stack, layer, length, of_rows)
                for layer in range(depth - 1, -1, -1)
            )
    return stacked


def _layer(
    backbone: Backbone, stack: str, layer: int, length: int, of_rows: Sequence[Layers]
) -> tuple[Tensor, Tensor]:
    """Every row's keys and values of one layer, counted from the top, padded on the left."""
    group = backbone.facts.stacks[stack].group_of(layer)
    shape = (len(of_rows), group.heads, length)
    dtype, device = backbone.dtype, backbone.device
    keys = torch.zeros((*shape, group.key_width), dtype=dtype, device=device)
    values = torch.zeros((*shape, group.value_width), dtype=dtype, device=device)
    for row, layers in enumerate(of_rows):
        if layer < len(layers):
            own_keys, own_values = layers[len(layers) - 1 - layer]
            keys[row, :, length - own_keys.shape[-2] :] = own_keys
            values[row, :, length - own_values.shape[-2] :] = own_values
    return keys, values


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


def combined(logits_MV: Tensor) -> Tensor:
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


def elected(answers: Sequence[tuple[str, float]]) -> int:
    """Which of an ensemble's answers (text, log-probability per token by who gave it) is given:
    the commonest (Lester et al. 2021, section 6), among equally common ones the likeliest."""
    votes = Counter(text for text, _ in answers)
    return max(range(len(answers)), key=lambda n: (votes[answers[n][0]], answers[n][1], -n))


def log_probability(logits_V: Tensor, token: int) -> float:
    """Of `token`, in nats."""
    return float(torch.log_softmax(logits_V.float(), dim=-1)[token])
