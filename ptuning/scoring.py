"""Losses of rows under a prefix or the base model, in nats per completion token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptuning.data.encode import Encoded
from ptuning.data.examples import check_example
from ptuning.errors import DataError
from ptuning.model.batch import PackPrefix
from ptuning.prefix.artifact import Prefix, pack_prefix
from ptuning.train.start import positions_of
from ptuning.train.step import LocalDriver, Machine, predicted, score_rows
from ptuning.types import Example, SplitLosses

if TYPE_CHECKING:  # it brings in Transformers
    from ptuning.model.backbone import Backbone


def encode(backbone: Backbone, example: Example, max_length: int = 512) -> Encoded:
    """Token ids and labels of one example, as training and serving see it. Raises DataError."""
    check_example(example)
    return backbone.template.encode(example, max_length)


def nll(
    backbone: Backbone,
    examples: Sequence[Example],
    prefix: Prefix | None = None,
    *,
    max_length: int = 512,
    tokens_per_microbatch: int = 1024,
) -> float:
    """Nats per completion token over all tokens of `examples`, under a prefix or the base model.

    Raises DataError where there is nothing to score.
    """
    rows = [encode(backbone, example, max_length) for example in examples]
    if prefix is None:
        pack = None
    else:
        prefix.check(backbone)
        around = prefix.arrangement(backbone.template)
        rows = [around.judged_row(row) for row in rows]
        pack = pack_prefix([prefix], backbone)
    shapes = {} if prefix is None else prefix.shapes
    needed = max((positions_of(row, backbone.facts, shapes) for row in rows), default=0)
    if (limit := backbone.facts.max_positions) is not None and needed > limit:
        raise DataError(
            "an example and its virtual tokens take more positions than the backbone has",
            seen=needed,
            expected=f"at most {limit}",
            fix="shorten the example or lower max_length",
        )
    members = 1 if prefix is None else prefix.method.members
    machine = score_split(backbone, [rows], pack, tokens_per_microbatch, members)
    (losses,) = LocalDriver(backbone).run(machine)
    if losses.nll is None:
        raise DataError("there are no completion tokens to score", seen=f"{len(rows)} examples")
    return losses.nll


def score_split(
    backbone: Backbone,
    users: Sequence[Sequence[Encoded]],
    prefix: PackPrefix | None,
    budget: int,
    members: int = 1,
) -> Machine[list[SplitLosses]]:
    """Losses of each user's rows under that user's slots of `prefix`: `members` after another.

    An ensemble's loss is that of the normalised mean of its members' log-probabilities, which is
    how it answers; one that votes is judged by it too, since a vote has no likelihood.
    """
    rows = [row for user in users for row in user]
    slots = [slot * members for slot, user in enumerate(users) for _ in user]
    sums = yield from score_rows(backbone, rows, slots, prefix, budget, members)
    left = iter(sums)
    return [
        SplitLosses(
            nats=tuple(next(left) for _ in user), tokens=tuple(predicted(row) for row in user)
        )
        for user in users
    ]
