"""Attention plans against rules written out by hand, without a model."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from ptuning.model.attention_plan import (
    AttentionFacts,
    AttentionLayer,
    Reach,
    Tokens,
    plan_attention,
)
from ptuning.model.batch import RowPrefix
from ptuning.model.discover import _evaluate
from ptuning.model.facts import DECODER

REACHES: dict[str, tuple[Reach, Any]] = {
    "causal": (Reach(ahead=0), causal_mask_function),
    "window": (Reach(back=2, ahead=0), sliding_window_causal_mask_function(3)),
    "chunk": (
        Reach(ahead=0, chunk=3),
        chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long)),
    ),
    "both ways": (Reach(back=3, ahead=3), sliding_window_bidirectional_mask_function(3)),
}


def test_a_reach_sees_what_transformers_mask_functions_show() -> None:
    at = torch.arange(20)
    for reach, function in REACHES.values():
        assert torch.equal(reach.sees(at[:, None], at[None]), _evaluate(function, at, at))


def facts_of(*reaches: Reach) -> AttentionFacts:
    count = len(reaches)
    layers = tuple(AttentionLayer(DECODER, n, count, reach) for n, reach in enumerate(reaches))
    return AttentionFacts({DECODER: layers}, torch.bool)


rows_of_prefixes = st.lists(
    st.fixed_dictionaries(
        {
            "tokens": st.integers(1, 7),
            "virtual": st.integers(0, 4),
            "depth": st.integers(1, 2),
            "infix": st.booleans(),
            "windowed": st.booleans(),
        }
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_prefixes, left=st.booleans(), name=st.sampled_from(["causal", "window"]))
def test_each_token_sees_what_its_own_row_says_whatever_the_neighbours(
    rows: list[dict[str, int]], left: bool, name: str
) -> None:
    """A real token sees the tokens of its row within the layer's reach. It sees the row's virtual
    tokens if the prefix has this layer, the token is not before an infix, and no window hides
    them. This holds for virtual tokens in front of the keys and in a cache's first columns."""
    reach, _ = REACHES[name]
    facts = facts_of(reach, reach)
    longest = max(row["tokens"] for row in rows)
    widest = max(row["virtual"] for row in rows)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for r, row in enumerate(rows):
        start = longest - row["tokens"] if left else 0
        mask[r, start : start + row["tokens"]] = 1
    lengths = torch.tensor([row["virtual"] for row in rows])
    depths = torch.tensor([row["depth"] if row["virtual"] else 0 for row in rows])
    policy: dict[str, Any] = {
        "infix": torch.tensor([bool(row["infix"]) for row in rows]),
        "windowed": torch.tensor([bool(row["windowed"]) for row in rows]),
        "depths": {DECODER: depths},
    }
    nothing = torch.zeros((len(rows), 1, widest, 1))
    layers = ((nothing, nothing), (nothing, nothing))
    prompts = torch.tensor([row["tokens"] for row in rows])
    front = plan_attention(
        {DECODER: Tokens.of_mask(mask, longest)},
        RowPrefix({DECODER: layers}, lengths, **policy),
        facts,
        prompts,
    )
    columns = torch.arange(longest)[None] + lengths[:, None]
    cached = plan_attention(
        {DECODER: Tokens.of_slots(columns, lengths, widest + longest, prompts - 1)},
        RowPrefix({}, lengths, **policy),
        facts,
        prompts,
    )
    for r, row in enumerate(rows):
        start = longest - row["tokens"] if left else 0
        first = row["tokens"] - 1 if row["infix"] else 0
        for number in range(2):
            below_top = 1 - number
            for i in range(row["tokens"]):
                text = {k for k in range(i + 1) if reach.back is None or i - k <= reach.back}
                virtual = {
                    -1 - n
                    for n in range(row["virtual"])
                    if row["depth"] > below_top
                    and i >= first
                    and (not row["windowed"] or reach.back is None or i + 1 + n <= reach.back)
                }
                sees = front.layers[DECODER][number].mask[r, 0, start + i]
                assert seen_keys(sees, widest, start) == text | virtual
                sees = cached.layers[DECODER][number].mask[r, 0, i]
                assert seen_keys(sees, row["virtual"]) == text | virtual
                for plan, at in ((front, start + i), (cached, i)):
                    assert plan.positions is not None
                    moved = row["virtual"] if i >= first else 0
                    assert int(plan.positions[r, at]) == i + moved


def seen_keys(sees: Tensor, virtual: int, padding: int = 0) -> set[int]:
    """The indices of the keys that are seen; virtual tokens have negative ones."""
    columns = [int(column) - virtual for column in sees.nonzero()[:, 0]]
    return {column if column < 0 else column - padding for column in columns}


def test_layers_that_see_alike_share_one_mask_and_others_have_their_own() -> None:
    causal, window = REACHES["causal"][0], REACHES["window"][0]
    facts = facts_of(causal, window, causal)
    tokens = {DECODER: Tokens.of_mask(torch.ones((2, 5), dtype=torch.long), 5)}
    first, second, third = plan_attention(tokens, None, facts).layers[DECODER]
    assert first.mask is third.mask
    assert not torch.equal(first.mask, second.mask)
    assert first.keys is None
