"""The next token of one row. A row's random stream depends on its own seed alone."""

from __future__ import annotations

import torch
from torch import Tensor

_GREEDY_BELOW = 1e-5  # a smaller temperature cannot be told from greedy
_LIKELY = 1024  # top_p almost always ends within these; sorting the vocabulary costs 10x more


def generator_of(seed: int) -> torch.Generator:
    """The random stream of one request, on the CPU whatever the device."""
    generator = torch.Generator()
    generator.manual_seed(seed & (2**63 - 1))
    return generator


def choose(
    logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> int:
    """A token id from finite fp32 logits on the CPU: the largest, or drawn (nucleus sampling,
    Holtzman et al. 2020, section 3.1: the fewest tokens whose probabilities reach `top_p`)."""
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
    """Index at `draw` (0 to 1) of the cumulative weights, which need not sum to 1."""
    cumulative = weights.cumsum(0)
    at = torch.searchsorted(cumulative, draw * cumulative[-1], right=True)
    return int(at.clamp_max(len(weights) - 1))
