"""Sample the next token of a row. A row's random stream depends only on its seed."""

from __future__ import annotations

import torch
from torch import Tensor

_GREEDY_BELOW = 1e-5  # smaller temperatures count as greedy
_LIKELY = 1024  # almost always enough for top_p; sorting the vocabulary costs 10x more


def generator_of(seed: int) -> torch.Generator:
    """The random stream of one request, on the CPU for every device."""
    generator = torch.Generator()
    generator.manual_seed(seed & (2**63 - 1))
    return generator


def choose(
    logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> int:
    """A token id from finite fp32 logits on the CPU: the most likely one, or drawn by nucleus
    sampling (Holtzman et al. 2020, section 3.1) from the smallest set of tokens whose probability
    reaches `top_p`."""
    if temperature < _GREEDY_BELOW or generator is None:
        return int(logits_V.argmax())
    probs = torch.softmax(logits_V.double() / temperature, dim=-1)
    draw = torch.rand((), generator=generator, dtype=torch.float64)
    if top_p >= 1.0:
        return _invert(probs, draw)
    likely, ids = probs.topk(min(_LIKELY, len(probs)))
    if float(likely.sum()) < top_p:
        likely, ids = probs.sort(descending=True)
    before = likely.cumsum(0) - likely
    kept = likely[before < top_p]
    return int(ids[_invert(kept, draw)])


def _invert(weights: Tensor, draw: Tensor) -> int:
    """The index at which the cumulative weights reach `draw` (0 to 1) of their sum."""
    cumulative = weights.cumsum(0)
    at = torch.searchsorted(cumulative, draw * cumulative[-1], right=True)
    return int(at.clamp_max(len(weights) - 1))
