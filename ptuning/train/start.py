"""Prepare a training: ensemble members, rows with virtual tokens, init words, warm starts.

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

if TYPE_CHECKING:  # it imports Transformers
    from ptuning.model.backbone import Backbone


def members_of(method: Method, template: Template, user: UserRows) -> list[UserRows]:
    """The trainings of one user, one per ensemble member, each with a separate seed and separate
    init ids; the method's layout puts virtual tokens into the rows."""
    layout = method.layout
    arrangement = None if layout is None else layout.bind(template)

    def arrange(rows: Sequence[Encoded]) -> tuple[Encoded, ...]:
        return tuple(rows) if arrangement is None else tuple(arrangement.row(row) for row in rows)

    rows = replace(user, train=arrange(user.train), valid=arrange(user.valid), test=())
    members = []
    for member in range(method.members):
        init_ids, spans = _select_init_ids(method, user, member)
        members.append(
            replace(
                rows,
                seed=user.seed if method.members == 1 else seed_of(user.seed, "member", member),
                init_ids=init_ids,
                spans=spans,
                start=user.start[member : member + 1],
                states=user.states[member : member + 1],
            )
        )
    return members


def _select_init_ids(
    method: Method, user: UserRows, member: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The member's share of the user's init ids, and its spans."""
    if method.start_ids == "none" or user.start or user.states:
        return (), ()
    count = method.num_virtual_tokens
    if not user.spans:
        # A user without rows may have no init ids either, and is never trained.
        ids = fill_words(user.init_ids or (0,), method.members * count)
        return tuple(ids[member * count : (member + 1) * count]), ()
    first, last = member * count, (member + 1) * count
    at, end = sum(user.spans[:first]), sum(user.spans[:last])
    return user.init_ids[at:end], user.spans[first:last]


def warm_start(method: Method, backbone: Backbone, prefix: Prefix) -> tuple[dict[str, Tensor], ...]:
    """The tensors of a trained prefix, to start a training from. Raises MethodError if the
    backbone does not support the method, WrongMethod if the method makes prefixes of another form,
    or an ArtifactError if the prefix is not of this backbone."""
    prefix.check(backbone)
    method.check(backbone.facts)
    wanted = _form_of(method, method.shapes(backbone.facts))
    given = _form_of(prefix.method, prefix.shapes)
    if given != wanted:
        raise WrongMethod(
            "the prefix to start from does not have the form of the prefix to be trained",
            seen=given,
            expected=wanted,
            fix="train with the method and settings that the prefix was made with (for PEFT's keys "
            "and values: method.sliding_window=respect)",
        )
    return tuple({name: t.float() for name, t in member.items()} for member in prefix.members)


def _form_of(method: Method, shapes: dict[str, tuple[int, ...]]) -> tuple[object, ...]:
    """What a prefix and a training that starts from it must have in common."""
    return shapes, method.members, _placement_of(method.layout), method.visibility


def _placement_of(layout: Layout | None) -> tuple[tuple[int | str, ...], ...]:
    """The placement of virtual tokens, whichever way the layout's text spells it."""
    return () if layout is None else (layout.before, layout.after)


def mean_of_spans(embedded: Tensor, spans: Sequence[int]) -> dict[str, Tensor]:
    """Initial embeddings from those of init words, `[n, E]`; with `spans`, each virtual token is
    the mean of a span."""
    if spans:
        embedded = torch.stack([span.mean(0) for span in embedded.split(list(spans))])
    return {EMBEDDINGS: embedded}


def positions_of(row: Encoded, facts: Facts, shapes: Mapping[str, Sequence[int]]) -> int:
    """How many positions a row needs with a prefix of these shapes; see `Facts.positions`."""
    answer = len(row.input_ids) - row.prompt_length
    return facts.positions(row.prompt_length, answer, tokens_inside(shapes))


def too_long(rows: UserRows, facts: Facts, method: Method) -> str | None:
    """Why the rows cannot be trained on, or None."""
    if not rows.train:
        return "the user has no train rows"
    limit, shapes = facts.max_positions, method.shapes(facts)
    longest = max(positions_of(row, facts, shapes) for row in (*rows.train, *rows.valid))
    if limit is not None and longest > limit:
        return (
            f"a row and its virtual tokens take {longest} positions, but the backbone has {limit}; "
            "lower data.max_length or method.num_virtual_tokens, or shorten method.template"
        )
    return None


def merge_members(user: UserRows, members: Sequence[Trained]) -> Trained:
    """Merge the results of one user's members; if one failed, the user failed."""
    failed = next((member.error for member in members if member.error is not None), None)
    kept = [member.members[0] for member in members if member.members is not None]
    return Trained(
        user_key=user.user_key,
        members=tuple(kept) if failed is None and len(kept) == len(members) else None,
        history=members[0].history if len(members) == 1 else _mean_history(members),
        steps=sum(member.steps for member in members),
        tokens=sum(member.tokens for member in members),
        error=failed,
        resets=sum(member.resets for member in members),
        states=tuple(state for member in members for state in member.states),
    )


def _mean_history(members: Sequence[Trained]) -> list[EpochLoss]:
    """Each epoch's losses, averaged over the members that reached it."""
    epochs = max(len(member.history) for member in members)
    mean: list[EpochLoss] = []
    for n in range(epochs):
        lines = [member.history[n] for member in members if n < len(member.history)]
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
