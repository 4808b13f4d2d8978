"""Prefixes prepared for inference, as generation and the service pass them to the model.

Virtual tokens at the input that come before all real tokens are converted once to keys and values
in every layer. Others stay embeddings and are processed with the prompt.
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

    It has `layers[stack]`, the keys `[H, P, Dk]` and values `[H, P, Dv]` of the stack's top K
    layers, or `embeddings` `[P, E]`.
    """

    layers: dict[str, Layers]
    embeddings: Tensor | None = None
    visibility: Visibility = field(default_factory=Visibility)

    @property
    def length(self) -> int:
        """P, the columns of its keys and values; 0 if it has only embeddings."""
        return max((self.length_in(stack) for stack in self.layers), default=0)

    def length_in(self, stack: str) -> int:
        """P in one stack; 0 if it has no keys and values there."""
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
        tensors = [p for layers in self.layers.values() for pair in layers for p in pair]
        return tensors if self.embeddings is None else [*tensors, self.embeddings]


@dataclass(frozen=True)
class ReadyPrefix:
    """A user's prefix prepared for inference. `arrangement` puts ids before and after a prompt."""

    members: tuple[Member, ...]
    arrangement: Arrangement = field(default_factory=Arrangement)
    combine: str = "mean"

    @property
    def voices(self) -> int:
        """How many answers are generated: one per member of an ensemble that votes, else one."""
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
    """Raise DataError unless a prompt (virtual tokens included) and `answer` more tokens fit into
    the backbone's positions."""
    limit = backbone.facts.max_positions
    inside = 0 if ready is None else ready.members[0].length_in(DECODER)
    needed = backbone.facts.positions(len(prompt), answer, inside)
    if limit is not None and needed > limit:
        raise DataError(
            "the backbone has too few positions",
            seen=f"{needed}: {len(prompt)} tokens of prompt, {answer} of answer, and "
            f"{ready.length if ready else 0} virtual tokens",
            expected=f"at most {limit} positions",
            fix="shorten the prompt or ask for fewer tokens",
        )


def make_ready(prefix: Prefix, backbone: Backbone) -> ReadyPrefix:
    """Check a prefix against the backbone and prepare it. Raises an ArtifactError."""
    prefix.check(backbone)
    arrangement, facts = prefix.arrangement(backbone.template), backbone.facts
    compiles = facts.decoder_start_id is None and facts.front_stays and arrangement.in_front > 0
    members = []
    for tensors in prefix.members:
        moved = {name: values.to(backbone.device) for name, values in tensors.items()}
        embeddings = moved.pop(EMBEDDINGS, None)
        if embeddings is not None and compiles:
            compiled = backbone.keys_and_values(embeddings[None])
            moved = {name: values[0] for name, values in compiled.items()}
            embeddings = None
        member = Member(
            split_groups({n: p.to(backbone.dtype) for n, p in moved.items()}, facts, 0),
            None if embeddings is None else embeddings.to(backbone.dtype),
            prefix.method.visibility,
        )
        if not member.finite:
            raise CorruptArtifact(
                "the prefix has values that overflow the backbone's dtype",
                seen=f"values that are not finite as {backbone.dtype}",
                fix="train it again with a lower learning rate",
            )
        members.append(member)
    return ReadyPrefix(
        tuple(members),
        arrangement.without_front() if compiles else arrangement,
        prefix.method.combination,
    )


def rows_of(
    backbone: Backbone, members: Sequence[Member | None], *, cached: bool = False
) -> RowPrefix | None:
    """The prefixes of a batch, padded on the left to the longest; None if no row has one.

    `cached`: their keys and values are already in the first columns of a cache. Everything that
    depends on lengths and depths is decided here on the host, so that the forward pass never waits
    for the device.
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
    """The number of layers of each row's prefix, for stacks in which rows differ; with a cache, for
    stacks in which some prefix lacks layers, since the cache has its columns in every layer."""
    depths = {}
    for stack, facts in backbone.facts.stacks.items():
        depth_of = [
            0 if member is None else len(member.layers.get(stack, ())) for member in members
        ]
        with_columns = {
            depth
            for depth, member in zip(depth_of, members, strict=True)
            if member and member.layers
        }
        differ = bool(with_columns - {facts.layers}) if cached else len(set(depth_of)) > 1
        if differ:
            depths[stack] = torch.tensor(depth_of, device=backbone.device)
    return depths


def _layers(backbone: Backbone, members: Sequence[Member | None], length: int) -> dict[str, Layers]:
    stacked = {}
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
    """All rows' keys and values in one layer, counted from the top, padded on the left."""
    group = backbone.facts.stacks[stack].group_of(layer)
    shape = (len(of_rows), group.heads, length)
    dtype, device = backbone.dtype, backbone.device
    keys = torch.zeros((*shape, group.key_width), dtype=dtype, device=device)
    values = torch.zeros((*shape, group.value_width), dtype=dtype, device=device)
    for row, layers in enumerate(of_rows):
        if layer < len(layers):
            row_keys, row_values = layers[len(layers) - 1 - layer]
            keys[row, :, length - row_keys.shape[-2] :] = row_keys
            values[row, :, length - row_values.shape[-2] :] = row_values
    return keys, values


def _embeddings(backbone: Backbone, members: Sequence[Member | None]) -> Tensor | None:
    embeddings = [None if member is None else member.embeddings for member in members]
    longest = max((len(values) for values in embeddings if values is not None), default=0)
    if not longest:
        return None
    shape = (len(members), longest, backbone.facts.hidden_size)
    rows = torch.zeros(shape, dtype=backbone.dtype, device=backbone.device)
    for row, values in enumerate(embeddings):
        if values is not None:
            rows[row, : len(values)] = values
    return rows


def combine_logits(logits_MV: Tensor) -> Tensor:
    """The logits `[V]` of one answer from its rows: those of the only row, or the mean of the
    members' log-probabilities. Raises BackboneError if they are not finite."""
    if len(logits_MV) == 1:
        logits_V = logits_MV[0]
    else:
        logits_V = torch.log_softmax(logits_MV.float(), dim=-1).mean(0)
    if not math.isfinite(largest := float(logits_V.max())):  # a NaN is the maximum
        raise BackboneError(
            "the model's logits are not finite", seen=largest, fix="check the prompt's prefix"
        )
    return logits_V


def pick_winner(answers: Sequence[tuple[str, float]]) -> int:
    """The index of the answer to return among those of an ensemble (text, log-probability per
    token): the most common text (Lester et al. 2021, section 6), and among ties the most likely."""
    votes = Counter(text for text, _ in answers)
    return max(range(len(answers)), key=lambda n: (votes[answers[n][0]], answers[n][1], -n))


def log_probability(logits_V: Tensor, token: int) -> float:
    """The log-probability of `token` in nats, given logits `[V]`."""
    return float(torch.log_softmax(logits_V.float(), dim=-1)[token])
