"""The gate: a candidate is promoted only if it is better on the user's validation rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptuning.errors import ConfigError
from ptuning.gate import GateConfig, GateInput, decide
from ptuning.types import Counts, Gate, Split, SplitLosses, UserReport

TOKENS = (20, 30, 10, 25, 40, 15, 20, 30)


def losses(nll: float, tokens: tuple[int, ...] = TOKENS, noise: float = 0.0) -> SplitLosses:
    """Rows of `tokens` with `nll` nats per token, alternately `noise` worse and better."""
    nats = tuple((nll + noise * (-1) ** row) * count for row, count in enumerate(tokens))
    return SplitLosses(nats=nats, tokens=tokens)


def gate(
    base: SplitLosses,
    candidate: SplitLosses,
    champion: SplitLosses | None = None,
    seed: int = 7,
    **config: float,
) -> Gate:
    return decide(
        GateConfig.model_validate(config),
        GateInput(seed=seed, base=base, candidate=candidate, champion=champion),
    )


def test_a_candidate_better_on_every_row_is_promoted() -> None:
    made = gate(losses(4.9), losses(4.2), losses(4.5))
    assert made.decision == "promoted"
    assert made.gain_over_base == pytest.approx(0.7)
    assert made.gain_over_champion == pytest.approx(0.3)
    assert made.confidence == 1.0
    assert not made.weak


def test_the_reason_is_one_sentence_with_the_numbers() -> None:
    made = gate(losses(4.9), losses(4.2), losses(4.5))
    for part in ("4.2000", "190 validation tokens", "8 rows", "0.7000 below the base's 4.9000"):
        assert part in made.reason
    assert "0.3000 below the champion's 4.5000 (100.0% of resamples)" in made.reason
    assert "90%" in made.reason
    assert "\n" not in made.reason


def test_without_a_champion_only_the_base_must_be_beaten() -> None:
    made = gate(losses(4.9), losses(4.2))
    assert made.decision == "promoted"
    assert made.gain_over_champion is None


def test_equal_losses_are_rejected() -> None:
    for tokens in (TOKENS, (3, 2)):
        same = losses(4.2, tokens)
        assert gate(same, same).decision == "rejected"
        assert gate(losses(4.9, tokens), same, same).decision == "rejected"


def test_beating_the_base_but_not_the_champion_is_rejected() -> None:
    made = gate(losses(4.9), losses(4.2), losses(4.1))
    assert made.decision == "rejected"
    assert "0.1000 above the champion's" in made.reason


def test_beating_a_bad_champion_but_not_the_base_is_rejected() -> None:
    assert gate(losses(4.0), losses(4.2), losses(5.0)).decision == "rejected"


def test_a_gain_not_above_min_gain_is_rejected() -> None:
    assert gate(losses(4.9), losses(4.4), min_gain=0.6).decision == "rejected"
    assert gate(losses(4.9), losses(4.2), min_gain=0.6).decision == "promoted"


def test_a_gain_that_hangs_on_a_few_rows_is_rejected_unless_less_confidence_is_asked() -> None:
    base, candidate = losses(4.5), losses(4.48, noise=1.0)
    made = gate(base, candidate)
    assert made.gain_over_base is not None
    assert made.gain_over_base > 0
    assert made.decision == "rejected"
    assert made.confidence is not None
    assert made.confidence < 0.9
    assert gate(base, candidate, confidence=0.1).decision == "promoted"


def test_the_confidence_is_the_worse_of_the_two_comparisons() -> None:
    unsure = losses(4.22, noise=0.3)
    alone = gate(losses(4.9), losses(4.2))
    both = gate(losses(4.9), losses(4.2), unsure)
    assert alone.confidence == 1.0
    assert both.confidence is not None
    assert both.confidence < 0.9
    assert both.decision == "rejected"


def test_long_rows_count_by_their_tokens() -> None:
    # Better on three short rows, worse on the long one: worse per token.
    base = SplitLosses(nats=(10.0, 10.0, 10.0, 400.0), tokens=(2, 2, 2, 100))
    candidate = SplitLosses(nats=(4.0, 4.0, 4.0, 420.0), tokens=(2, 2, 2, 100))
    assert gate(base, candidate, confidence=0.0).decision == "rejected"


def test_few_tokens_are_compared_by_their_means_and_flagged_weak() -> None:
    few = (4, 6, 2)  # the noise cancels
    made = gate(losses(4.9, few), losses(4.8, few, noise=2.0))
    assert (made.decision, made.weak, made.confidence) == ("promoted", True, None)
    assert "means only" in made.reason
    assert gate(losses(4.9, few), losses(5.0, few)).decision == "rejected"


def test_min_valid_tokens_itself_is_enough() -> None:
    exact = (32, 32)
    assert not gate(losses(4.9, exact), losses(4.2, exact)).weak
    assert gate(losses(4.9, (32, 31)), losses(4.2, (32, 31))).weak


def test_a_single_row_has_no_spread_and_is_weak() -> None:
    assert gate(losses(4.9, (500,)), losses(4.2, (500,))).weak
    assert gate(losses(4.9, (500, 0)), losses(4.2, (500, 0))).weak


def test_no_validation_tokens_is_rejected_with_a_reason() -> None:
    for empty in (SplitLosses(), SplitLosses(nats=(0.0, 0.0), tokens=(0, 0))):
        made = gate(empty, empty)
        assert made.decision == "rejected"
        assert "no validation tokens" in made.reason


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("who", ["base", "candidate"])
def test_a_loss_that_is_not_finite_is_rejected_and_named(bad: float, who: str) -> None:
    three = {"base": losses(4.9), "candidate": losses(4.2), "champion": losses(4.5)}
    three[who] = replace(three[who], nats=(bad, *three[who].nats[1:]))
    made = gate(three["base"], three["candidate"], three["champion"])
    assert made.decision == "rejected"
    assert who in made.reason
    assert "finite" in made.reason


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_champion_without_a_finite_loss_is_no_rival(bad: float) -> None:
    """Otherwise it would stay champion for ever."""
    champion = replace(losses(1.0), nats=(bad, *losses(1.0).nats[1:]))
    assert gate(losses(4.9), losses(4.2), champion) == gate(losses(4.9), losses(4.2))


def test_a_loss_that_was_not_measured_promotes_nothing() -> None:
    for base, candidate in ((None, losses(4.2)), (losses(4.9), None)):
        given = GateInput(seed=1, base=base, candidate=candidate)
        assert decide(GateConfig(), given).decision == "rejected"


def test_a_report_says_the_gate_its_validation_losses_and_counts_and_no_test_loss() -> None:
    counts: dict[Split, Counts] = {"train": {"rows": 9, "tokens": 70}}
    report = UserReport(user_key="u", status="trained", counts=counts)
    report.losses = {
        "base": {"valid": losses(4.9), "test": losses(1.0)},
        "candidate": {"valid": losses(4.2), "test": losses(9.0)},
    }
    given = GateInput.of(report)
    assert (given.base, given.candidate, given.champion) == (losses(4.9), losses(4.2), None)
    assert given.counts == counts
    report.user_key = "v"
    assert GateInput.of(report).seed != given.seed, "each user has separate resamples"


def test_losses_of_other_rows_are_an_error() -> None:
    fine, swapped = losses(4.2), losses(4.9, TOKENS[::-1])
    for wrong in (swapped, losses(4.9, TOKENS[:-1]), replace(fine, nats=fine.nats[:-1])):
        with pytest.raises(ValueError, match="different rows: the base"):
            gate(wrong, fine)
        with pytest.raises(ValueError, match="different rows: the champion"):
            gate(losses(4.9), fine, wrong)
    with pytest.raises(ValueError, match="different rows"):
        gate(fine, replace(fine, nats=fine.nats[:-1]))
    negative = SplitLosses(nats=(1.0, 1.0), tokens=(-1, 80))
    with pytest.raises(ValueError, match="negative"):
        gate(negative, negative)


@pytest.mark.parametrize(
    "wrong",
    [{"confidence": 1.1}, {"confidence": -0.1}, {"resamples": 0}, {"min_gain": math.nan}, {"x": 1}],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        GateConfig.model_validate(wrong)


def test_resamples_in_chunks_give_what_they_give_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, candidate = losses(4.5), losses(4.4, noise=0.3)
    whole = gate(base, candidate)
    monkeypatch.setattr("ptuning.gate._CHUNK", 1000)
    assert gate(base, candidate) == whole


# Properties.

Row = tuple[int, float, float, float]
ROWS = st.lists(st.tuples(st.integers(0, 200), *([st.floats(0, 12)] * 3)), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**63 - 1)


def three_of(rows: list[Row]) -> list[SplitLosses]:
    """Base, candidate and champion with the rows' tokens and nats per token."""
    tokens = tuple(row[0] for row in rows)
    return [
        SplitLosses(nats=tuple(row[0] * row[who] for row in rows), tokens=tokens)
        for who in (1, 2, 3)
    ]


@given(ROWS, SEEDS)
def test_a_decision_is_a_function_of_its_arguments(rows: list[Row], seed: int) -> None:
    base, candidate, champion = three_of(rows)
    assert gate(base, candidate, champion, seed) == gate(base, candidate, champion, seed)


@given(ROWS, SEEDS)
def test_promoted_means_a_better_mean_than_every_rival(rows: list[Row], seed: int) -> None:
    base, candidate, champion = three_of(rows)
    made = gate(base, candidate, champion, seed)
    if made.decision == "promoted":
        assert candidate.nll is not None
        assert base.nll is not None
        assert champion.nll is not None
        assert candidate.nll < base.nll + 1e-9
        assert candidate.nll < champion.nll + 1e-9
        assert made.gain_over_base == pytest.approx(base.nll - candidate.nll, abs=1e-9)
        assert made.gain_over_champion == pytest.approx(champion.nll - candidate.nll, abs=1e-9)


@given(ROWS, SEEDS)
def test_a_champion_can_only_make_the_gate_stricter(rows: list[Row], seed: int) -> None:
    base, candidate, champion = three_of(rows)
    if gate(base, candidate, champion, seed).decision == "promoted":
        assert gate(base, candidate, None, seed).decision == "promoted"


@given(ROWS, SEEDS, st.floats(0, 3))
def test_a_better_candidate_is_never_treated_worse(
    rows: list[Row], seed: int, better: float
) -> None:
    base, candidate, champion = three_of(rows)
    improved = replace(
        candidate,
        nats=tuple(n - better * t for n, t in zip(candidate.nats, candidate.tokens, strict=True)),
    )
    if gate(base, candidate, champion, seed).decision == "promoted":
        assert gate(base, improved, champion, seed).decision == "promoted"


@given(ROWS, SEEDS, st.floats(0, 2))
def test_asking_for_more_gain_never_promotes_more(
    rows: list[Row], seed: int, min_gain: float
) -> None:
    base, candidate, champion = three_of(rows)
    if gate(base, candidate, champion, seed, min_gain=min_gain).decision == "promoted":
        assert gate(base, candidate, champion, seed, min_gain=0.0).decision == "promoted"


@given(ROWS, SEEDS)
def test_a_prefix_never_replaces_itself(rows: list[Row], seed: int) -> None:
    base, candidate, _ = three_of(rows)
    assert gate(base, candidate, candidate, seed).decision == "rejected"
