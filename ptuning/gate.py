"""The gate: does a candidate beat what the user has now? A pure function of losses and a seed.

It bootstraps over the user's validation rows. One user's rows are few and vary much, so a mean
over eight rows says little without its spread. Rows are resampled, not tokens, because the tokens
of a row are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ptuning.types import Config, Counts, Gate, Split, SplitLosses, UserReport, seed_of

_Floats = npt.NDArray[np.float64]
_CHUNK = 4_000_000  # elements of a matrix of resamples x rows: 32 MB


class GateConfig(Config):
    """When a candidate becomes the champion."""

    SECTION: ClassVar[str] = "gate"

    min_gain: float = Field(
        0.0,
        allow_inf_nan=False,
        description="a candidate must beat the base and the current champion by more than this "
        "on validation (nats per completion token)",
    )
    confidence: float = Field(
        0.9,
        ge=0.0,
        le=1.0,
        description="share of bootstrap resamples of the user's validation rows in which it must "
        "beat them by more than min_gain",
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
    """The candidate against one rival, in nats per token; `share` is that of resamples won, or
    None without resampling."""

    rival: Literal["base", "champion"]
    rival_nll: float
    gain: float
    share: float | None


@dataclass(frozen=True, kw_only=True)
class GateInput:
    """The input of a decision: one user's losses, and how much data they were trained and scored
    on.

    All losses are on the same validation rows, or None if not measured; `champion` is None if the
    user has none. `counts` are the rows and tokens of each split, for rules that require more of
    them. Test rows are counted but never affect a decision.
    """

    seed: int  # of the resamples
    base: SplitLosses | None
    candidate: SplitLosses | None
    champion: SplitLosses | None = None
    counts: Mapping[Split, Counts] = field(default_factory=dict)

    @classmethod
    def of(cls, report: UserReport) -> GateInput:
        """The input from a worker's report, of this run or an earlier one."""

        def valid(name: str) -> SplitLosses | None:
            return report.losses.get(name, {}).get("valid")

        return cls(
            seed=seed_of(report.user_key, "gate"),
            base=valid("base"),
            candidate=valid("candidate"),
            champion=valid("champion"),
            counts=report.counts,
        )


def decide(config: GateConfig, given: GateInput) -> Gate:
    """Whether the candidate becomes this user's champion: "promoted" or "rejected".

    The gain over a rival is its summed nats minus the candidate's, divided by the number of tokens.
    The candidate is promoted if its gain over the base and over the champion is above `min_gain`,
    and is so in a share of `confidence` of the resamples (paired: the same rows for all). It is
    rejected if the loss of the base or of the candidate is missing or not finite. A champion with
    such a loss is ignored, or it would stay forever. Raises ValueError if the rows are not the
    same.

        >>> base = SplitLosses(nats=(9.0,), tokens=(3,))
        >>> better = SplitLosses(nats=(6.0,), tokens=(3,))
        >>> decide(GateConfig(), GateInput(seed=0, base=base, candidate=better)).decision
        'promoted'
    """
    base, candidate, champion = given.base, given.candidate, given.champion
    if base is None or candidate is None:
        return _reject("no validation loss was measured")
    rivals = [("base", base)]
    if champion is not None and math.isfinite(sum(champion.nats)):
        rivals.append(("champion", champion))
    tokens = _align(candidate, rivals)
    named = [("candidate", candidate), *rivals]
    broken = [name for name, losses in named if not np.isfinite(np.sum(losses.nats))]
    if broken:
        return _reject(f"the {' and the '.join(broken)} has a validation loss that isn't finite")
    if not tokens.sum():
        return _reject("there are no validation tokens to compare on")

    weak = tokens.sum() < config.min_valid_tokens or np.count_nonzero(tokens) < 2
    # [rivals, R]: how much lower the candidate's loss is on each row
    saved = np.array([np.subtract(losses.nats, candidate.nats) for _, losses in rivals])
    gains = saved.sum(axis=1) / tokens.sum()
    shares = [None] * len(rivals) if weak else _shares(config, saved, tokens, given.seed)
    comparisons = [
        _Comparison(
            rival="base" if name == "base" else "champion",
            rival_nll=float(np.sum(losses.nats) / tokens.sum()),
            gain=float(gain),
            share=share,
        )
        for (name, losses), gain, share in zip(rivals, gains, shares, strict=True)
    ]
    return _gate(config, candidate, tokens, comparisons)


def _align(candidate: SplitLosses, rivals: list[tuple[str, SplitLosses]]) -> _Floats:
    """The rows' token counts [R], after checking that all losses are of the same rows."""
    for name, losses in [("candidate", candidate), *rivals]:
        if len(losses.nats) != len(losses.tokens) or losses.tokens != candidate.tokens:
            raise ValueError(
                f"losses of different rows: the {name} has {len(losses.nats)} losses of "
                f"{sum(losses.tokens)} tokens in {len(losses.tokens)} rows, the candidate "
                f"{sum(candidate.tokens)} in {len(candidate.tokens)}; evaluate both on one split"
            )
    if any(count < 0 for count in candidate.tokens):
        raise ValueError(f"a row has {min(candidate.tokens)} tokens; counts cannot be negative")
    return np.array(candidate.tokens, dtype=np.float64)


def _shares(config: GateConfig, saved: _Floats, tokens: _Floats, seed: int) -> list[float]:
    """For each rival, the share of resamples in which the gain is above `min_gain`.

    `saved` is [rivals, R] and `tokens` [R]. This is the percentile bootstrap of a ratio (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13); drawing R rows with
    replacement gives multinomial counts.
    """
    scored = tokens > 0  # a row without tokens carries no information
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
    against = " and ".join(_describe(c) for c in comparisons)
    return Gate(
        decision="promoted" if promoted else "rejected",
        reason=f"{candidate.nll:.4f} nats per token on {tokens.sum():.0f} validation tokens in "
        f"{np.count_nonzero(tokens)} rows, {against}; {needed}",
        gain_over_base=comparisons[0].gain,
        gain_over_champion=comparisons[1].gain if len(comparisons) > 1 else None,
        confidence=min(shares) if shares else None,
        weak=not shares,
    )


def _describe(comparison: _Comparison) -> str:
    side = "above" if comparison.gain < 0 else "below"
    text = f"{abs(comparison.gain):.4f} {side} the {comparison.rival}'s {comparison.rival_nll:.4f}"
    return text if comparison.share is None else f"{text} ({comparison.share:.1%} of resamples)"


def _reject(reason: str) -> Gate:
    return Gate(decision="rejected", reason=reason)
