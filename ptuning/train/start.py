"""Where a training begins: a user's members, their rows around virtual tokens, their first words,
or a trained prefix.

Shared by the plain and the packed trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptuning.data.encode import Encoded, Template
from ptuning.data.layout import Layout
from ptuning.data.packing import fill_words
from ptuning.errors import WrongMethod
from ptuning.methods.base import Method
from ptuning.model.batch import EMBEDDINGS
from ptuning.model.facts import Facts, tokens_inside
from ptuning.prefix.artifact import Prefix
from ptuning.train.config import Trained, UserRows
from ptuning.types import EpochLoss, seed_of

if TYPE_CHECKING:  # it brings in Transformers
    from ptuning.model.backbone import Backbone


def members_of(method: Method, template: Template, user: UserRows) -> list[UserRows]:
    """The trainings of one user, each with its own seed and first words; rows as the method's
    layout arranges them."""
    layout = method.layout
    around = None if layout is None else layout.bind(template)

    def arrange(rows: Sequence[Encoded]) -> tuple[Encoded, ...]:
        return tuple(rows) if around is None else tuple(around.row(row) for row in rows)

    rows = replace(user, train=arrange(user.train), valid=arrange(user.valid), test=())
    members = []
    for member in range(method.members):
        words, spans = _words(method, user, member)
        members.append(
            replace(
                rows,
                seed=user.seed if method.members == 1 else seed_of(user.seed, "member", member),
                words=words,
                spans=spans,
                start=user.start[member : member + 1],
                states=user.states[member : member + 1],
            )
        )
    return members


def _words(method: Method, user: UserRows, member: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The member's share of the user's first words, and its spans."""
    if method.start_ids == "none" or user.start or user.states:
        return (), ()
    count = method.num_virtual_tokens
    if not user.spans:
        # A user without rows may have no words either: it is never trained.
        words = fill_words(user.words or (0,), method.members * count)
        return tuple(words[member * count : (member + 1) * count]), ()
    first, last = member * count, (member + 1) * count
    at, end = sum(user.spans[:first]), sum(user.spans[:last])
    return user.words[at:end], user.spans[first:last]


def warm_start(method: Method, backbone: Backbone, prefix: Prefix) -> tuple[dict[str, Tensor], ...]:
    """A trained prefix as what a training starts from. Raises MethodError where the backbone
    cannot do the method, WrongMethod where its prefixes have other shapes, or an ArtifactError
    where the prefix is not of this backbone."""
    prefix.check(backbone)
    method.check(backbone.facts)
    wanted = _kind_of(method, method.shapes(backbone.facts))
    seen = _kind_of(prefix.method, prefix.shapes)
    if seen != wanted:
        raise WrongMethod(
            "the prefix to start from is not of the kind that is trained",
            seen=seen,
            expected=wanted,
            fix="train with the method and settings that the prefix was made with (keys and values "
            "of PEFT's: method.sliding_window=respect)",
        )
    return tuple({name: t.float() for name, t in own.items()} for own in prefix.members)


def _kind_of(method: Method, shapes: dict[str, tuple[int, ...]]) -> tuple[object, ...]:
    """What prefixes must have in common for one to be the start of another's training."""
    return shapes, method.members, _places_of(method.layout), method.visibility


def _places_of(layout: Layout | None) -> tuple[tuple[int | str, ...], ...]:
    """Where virtual tokens stand, however the template says it."""
    return () if layout is None else (layout.before, layout.after)


def mean_of_spans(embedded: Tensor, spans: Sequence[int]) -> dict[str, Tensor]:
    """What words' embeddings `[n, E]` start a prefix as; a virtual token of several words is
    their mean."""
    if spans:
        embedded = torch.stack([own.mean(0) for own in embedded.split(list(spans))])
    return {EMBEDDINGS: embedded}


def positions_of(row: Encoded, facts: Facts, shapes: Mapping[str, Sequence[int]]) -> int:
    """How many positions a row takes behind a prefix of these shapes; see `Facts.positions`."""
    answer = len(row.input_ids) - row.prompt_length
    return facts.positions(row.prompt_length, answer, tokens_inside(shapes))


def too_long(rows: UserRows, facts: Facts, method: Method) -> str | None:
    """Why the rows cannot be trained, if they cannot."""
    if not rows.train:
        return "the user has no train rows"
    limit, shapes = facts.max_positions, method.shapes(facts)
    longest = max(positions_of(row, facts, shapes) for row in (*rows.train, *rows.valid))
    if limit is not None and longest > limit:
        return (
            f"a row and its virtual tokens take {longest} positions, but the backbone has {limit}; "
            "lower data.max_length, method.num_virtual_tokens or what method.template adds"
        )
    return None


def merge_members(user: UserRows, members: Sequence[Trained]) -> Trained:
    """One user's result from its members': all of them, or what failed."""
    failed = next((one.error for one in members if one.error is not None), None)
    kept = [one.members[0] for one in members if one.members is not None]
    return Trained(
        user_key=user.user_key,
        members=tuple(kept) if failed is None and len(kept) == len(members) else None,
        history=members[0].history if len(members) == 1 else _mean_history(members),
        steps=sum(one.steps for one in members),
        tokens=sum(one.tokens for one in members),
        error=failed,
        resets=sum(one.resets for one in members),
        states=tuple(state for one in members for state in one.states),
    )


def _mean_history(members: Sequence[Trained]) -> list[EpochLoss]:
    """Each epoch's losses, averaged over the members that reached it."""
    epochs = max(len(one.history) for one in members)
    mean: list[EpochLoss] = []
    for n in range(epochs):
        lines = [one.history[n] for one in members if n < len(one.history)]
        train = [line["train"] for line in lines if line["train"] is not None]
        valid = [line["valid"] for line in lines if line["valid"] is not None]
        mean.append(
            EpochLoss(
                epoch=lines[0]["epoch"],
                train=sum(train) / len(train) if train else None,
                valid=sum(valid) / len(valid) if valid else None,
            )
        )
    return mean
