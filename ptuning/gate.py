"""The gate: does a candidate beat what the user has now? A pure function of losses and a seed.

It resamples one user's own validation rows, since rows of one person are few and unlike each
other: a mean over eight rows says little without the spread. Rows, not tokens, are resampled:
tokens of one row are not independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ptuning.types import Config, Gate, SplitLosses

_Floats = npt.NDArray[np.float64]
_CHUNK = 4_000_000  # elements of a matrix of resamples x rows: 32 MB


class GateConfig(Config):
    """When a candidate becomes the champion."""

    min_gain: float = Field(
        0.0,
        allow_inf_nan=False,
        description="a candidate must beat the base and the present champion by more than this "
        "on validation (nats per completion token)",
    )
    confidence: float = Field(
        0.9,
        ge=0.0,
        le=1.0,
        description="share of bootstrap resamples of the user's validation rows in which it must",
    )
    min_valid_tokens: int = Field(
        64,
        ge=0,
        description="with fewer validation tokens than this (or a single row) only the means are "
        "compared, and the decision is marked weak",
    )
    resamples: int = Field(1000, ge=1, description="bootstrap resamples per decision")


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """The candidate against one rival, in nats per token; `share` of resamples won, if any."""

    rival: Literal["base", "champion"]
    rival_nll: float
    gain: float
    share: float | None


def decide(
    config: GateConfig,
    *,
    base: SplitLosses,
    candidate: SplitLosses,
    champion: SplitLosses | None,
    seed: int,
) -> Gate:
    """Whether `candidate` becomes this user's champion: "promoted" or "rejected".

    The three are losses on the same validation rows; `champion` is None where the user has
    none. Promoted if the gain, summed nats of the rival less the candidate's over summed
    tokens, is above `min_gain` against the base and against the champion, and is so in
    `confidence` of the resamples of rows (paired: all see the same resamples). A loss that is
    not finite rejects. Raises ValueError if the rows are not the same.
    """
    rivals = [("base", base)] + ([("champion", champion)] if champion is not None else [])
    tokens = _aligned(candidate, rivals)
    named = [("candidate", candidate), *rivals]
    broken = [who for who, losses in named if not np.isfinite(np.sum(losses.nats))]
    if broken:
        return _rejected(f"the {' and the '.join(broken)} has a validation loss that isn't finite")
    if not tokens.sum():
        return _rejected("there are no validation tokens to compare on")

    weak = tokens.sum() < config.min_valid_tokens or np.count_nonzero(tokens) < 2
    # [rivals, R]: what the candidate saves on each row
    saved = np.array([np.subtract(losses.nats, candidate.nats) for _, losses in rivals])
    gains = saved.sum(axis=1) / tokens.sum()
    shares = [None] * len(rivals) if weak else _shares(config, saved, tokens, seed)
    comparisons = [
        _Comparison(
            rival="base" if who == "base" else "champion",
            rival_nll=float(np.sum(losses.nats) / tokens.sum()),
            gain=float(gain),
            share=share,
        )
        for (who, losses), gain, share in zip(rivals, gains, shares, strict=True)
    ]
    return _gate(config, candidate, tokens, comparisons)


def _aligned(candidate: SplitLosses, rivals: list[tuple[str, SplitLosses]]) -> _Floats:
    """The rows' token counts [R], after checking that all losses are of the same rows."""
    for who, losses in [("candidate", candidate), *rivals]:
        if len(losses.nats) != len(losses.tokens) or losses.tokens != candidate.tokens:
            raise ValueError(
                f"losses of different rows: the {who} has {len(losses.nats)} losses of "
                f"{sum(losses.tokens)} tokens in {len(losses.tokens)} rows, the candidate "
                f"{sum(candidate.tokens)} in {len(candidate.tokens)}; evaluate both on one split"
            )
    if any(count < 0 for count in candidate.tokens):
        raise ValueError(f"a row has {min(candidate.tokens)} tokens; counts cannot be negative")
    return np.array(candidate.tokens, dtype=np.float64)


def _shares(config: GateConfig, saved: _Floats, tokens: _Floats, seed: int) -> list[float]:
    """For each rival, the share of resamples in which the gain is above `min_gain`.

    `saved` [rivals, R] and `tokens` [R]. Percentile bootstrap of a ratio (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): drawing R rows with
    replacement is a multinomial count of each row.
    """
    scored = tokens > 0  # a row without tokens says nothing
    saved, tokens = saved[:, scored], tokens[scored]
    rows = len(tokens)
    random = np.random.default_rng(seed)
    won = np.zeros(len(saved))
    left = config.resamples
    while left:
        size = min(left, max(1, _CHUNK // rows))
        counts = random.multinomial(rows, np.full(rows, 1 / rows), size=size)  # [size, R]
        gains = (saved @ counts.T) / (counts @ tokens)  # [rivals, size]
        won += (gains > config.min_gain).sum(axis=1)
        left -= size
    return [float(share) for share in won / config.resamples]


def _gate(
    config: GateConfig, candidate: SplitLosses, tokens: _Floats, comparisons: list[_Comparison]
) -> Gate:
    shares = [c.share for c in comparisons if c.share is not None]
    promoted = all(
        c.gain > config.min_gain and (c.share is None or c.share >= config.confidence)
        for c in comparisons
    )
    needed = f"needed more than {config.min_gain:g}"
    needed += f" in {config.confidence:.0%} of resamples" if shares else ", means only: few tokens"
    against = " and ".join(_told(c) for c in comparisons)
    return Gate(
        decision="promoted" if promoted else "rejected",
        reason=f"{candidate.nll:.4f} nats per token on {tokens.sum():.0f} validation tokens in "
        f"{np.count_nonzero(tokens)} rows, {against}; {needed}",
        gain_over_base=comparisons[0].gain,
        gain_over_champion=comparisons[1].gain if len(comparisons) > 1 else None,
        confidence=min(shares) if shares else None,
        weak=not shares,
    )


def _told(comparison: _Comparison) -> str:
    side = "above" if comparison.gain < 0 else "below"
    told = f"{abs(comparison.gain):.4f} {side} the {comparison.rival}'s {comparison.rival_nll:.4f}"
    return told if comparison.share is None else f"{told} ({comparison.share:.1%} of resamples)"


def _rejected(reason: str) -> Gate:
    return Gate(decision="rejected", reason=reason)
