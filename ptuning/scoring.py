"""Compute losses of rows with a prefix or with the base model, in nats per completion token."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ptuning.data.encode import Encoded
from ptuning.data.examples import check_example
from ptuning.data.layout import Arrangement
from ptuning.errors import DataError
from ptuning.model.batch import PackPrefix
from ptuning.prefix.artifact import Prefix, pack_prefix
from ptuning.train.start import positions_of
from ptuning.train.step import LocalDriver, Machine, predicted, score_rows
from ptuning.types import Example, Split, SplitLosses, seed_of

if TYPE_CHECKING:  # it imports Transformers
    from ptuning.model.backbone import Backbone


def encode(backbone: Backbone, example: Example, max_length: int = 512) -> Encoded:
    """Token ids and labels of one example, as in training and serving. Raises DataError."""
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
    """Nats per completion token over all tokens of `examples`, with a prefix or the base model.

    Raises DataError if an example is invalid or too long, or if there is nothing to score.

        ptuning.nll(backbone, examples, prefix) < ptuning.nll(backbone, examples)
    """
    rows = [encode(backbone, example, max_length) for example in examples]
    if prefix is None:
        pack = None
    else:
        prefix.check(backbone)
        arrangement = prefix.arrangement(backbone.template)
        rows = [arrangement.judged_row(row) for row in rows]
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
    """Losses of each user's rows with the user's slots of `prefix`; user i has the slots from
    i * `members` on.

    An ensemble's loss is that of the normalised mean of its members' log-probabilities, which is
    how it answers. An ensemble that votes is scored in the same way, since a vote has no
    likelihood.
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


@dataclass(kw_only=True)
class ScoredUser:
    """One user's rows, the prefixes to score on them, and the results.

    `losses[name][split]` has "base", "candidate", "champion" if there is one that can be scored,
    and "other": the candidate of another user of the pack, to show how personal a prefix is.
    """

    user_key: str
    valid: tuple[Encoded, ...]
    test: tuple[Encoded, ...]
    candidate: Prefix
    champion: Prefix | None = None
    champion_ignored: str = ""
    test_rows_too_long: int = 0
    losses: dict[str, dict[str, SplitLosses]] = field(default_factory=dict)


def score_users(backbone: Backbone, users: Sequence[ScoredUser], budget: int) -> Machine[None]:
    """Set each user's losses with the base, the champion, the candidate and another user's prefix.

    All are scored on the same rows: test rows too long for one of them are left out.
    """
    others = _draw_others(users)
    for user in users:
        _drop_too_long(backbone, user, others.get(user.user_key))
    scored: tuple[tuple[str, list[Prefix | None]], ...] = (
        ("base", [None] * len(users)),
        ("champion", [user.champion for user in users]),
        ("candidate", [user.candidate for user in users]),
        ("other", [others.get(user.user_key) for user in users]),
    )
    splits: tuple[Split, ...] = ("valid", "test")
    for split in splits:
        for name, prefixes in scored:
            groups = [list(range(len(users)))] if name == "base" else _group_by_form(prefixes)
            for group in groups:
                chosen = [prefix for n in group if (prefix := prefixes[n]) is not None]
                losses = yield from score_split(
                    backbone,
                    [_arrange_rows(backbone, users[n], prefixes[n], split) for n in group],
                    pack_prefix(chosen, backbone) if chosen else None,
                    budget,
                    chosen[0].method.members if chosen else 1,
                )
                for n, loss in zip(group, losses, strict=True):
                    if loss.tokens:
                        users[n].losses.setdefault(name, {})[split] = loss


def _drop_too_long(backbone: Backbone, user: ScoredUser, other: Prefix | None) -> None:
    """Drop test rows that are too long for one of the prefixes, and a champion for which validation
    rows are too long. (The candidate was trained on these rows, so they fit.)"""
    limit = backbone.facts.max_positions
    if limit is None:
        return

    def fits(row: Encoded, prefix: Prefix | None) -> bool:
        arrangement = Arrangement() if prefix is None else prefix.arrangement(backbone.template)
        shapes = {} if prefix is None else prefix.shapes
        return positions_of(arrangement.row(row), backbone.facts, shapes) <= limit

    if user.champion and not all(fits(row, user.champion) for row in user.valid):
        user.champion = None
        reason = "the backbone has too few positions for it and the validation rows"
        user.champion_ignored = reason
    prefixes = (user.candidate, user.champion, other)
    test = tuple(row for row in user.test if all(fits(row, prefix) for prefix in prefixes))
    user.test_rows_too_long = len(user.test) - len(test)
    user.test = test


def _arrange_rows(
    backbone: Backbone, user: ScoredUser, prefix: Prefix | None, split: Split
) -> list[Encoded]:
    """A user's rows of a split, with the prefix's virtual tokens in place."""
    rows = user.valid if split == "valid" else user.test
    if prefix is None:
        return list(rows)
    arrangement = prefix.arrangement(backbone.template)
    return [arrangement.judged_row(row) for row in rows]


def _draw_others(users: Sequence[ScoredUser]) -> Mapping[str, Prefix]:
    """For each user another user's candidate, drawn with a seed that depends on the user."""
    drawn = {}
    for user in users:
        rest = [other.candidate for other in users if other is not user]
        if rest:
            picker = random.Random(seed_of(user.user_key, "other"))
            drawn[user.user_key] = picker.choice(rest)
    return drawn


def _group_by_form(prefixes: Sequence[Prefix | None]) -> list[list[int]]:
    """Indices of prefixes that can be stacked: those with equal shapes and visibility."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for n, prefix in enumerate(prefixes):
        if prefix is not None:
            shapes = tuple(sorted(prefix.shapes.items()))
            groups[shapes, prefix.method.members, prefix.method.visibility].append(n)
    return list(groups.values())
