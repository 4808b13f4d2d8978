"""Group rows into batches: pure functions of lengths, ids and seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ptuning.types import seed_of


def epoch_batches(rows: int, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's batches of a user's row indices, shuffled by (seed, epoch) only.

    Every row is in exactly one batch; only the last batch may be short.
    """
    order = list(range(rows))
    random.Random(seed_of(seed, "epoch", epoch)).shuffle(order)
    return [order[at : at + batch_size] for at in range(0, rows, batch_size)]


def microbatches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group rows of similar length so that rows times longest row stays within `budget` tokens.

    A row longer than the budget is a microbatch by itself. The longest rows come first, so that the
    largest allocation does. Ties keep their order, so the result depends only on the arguments.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups: list[list[int]] = []
    longest = 0
    for row in order:
        if groups and (len(groups[-1]) + 1) * longest <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = lengths[row]
    return groups


def fill_words(ids: Sequence[int], count: int) -> list[int]:
    """Exactly `count` ids: the first ones, repeated from the start if there are too few."""
    if not ids:
        raise ValueError("no ids to fill from")
    return [ids[n % len(ids)] for n in range(count)]
