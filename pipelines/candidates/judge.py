"""Gate a run's candidates: each user's losses decide about that user's prefix, nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from ptuning.gate import GateConfig, decide
from ptuning.types import Gate, SplitLosses, UserReport, seed_of


def gate_all(reports: Iterable[UserReport], config: GateConfig) -> None:
    """Set `gate` and `decision` of every trained user."""
    for report in reports:
        if report.status == "trained":
            gate = gate_one(report, config)
            if ignored := report.details.get("champion_ignored"):
                gate = replace(gate, reason=f"{gate.reason}; the champion did not count: {ignored}")
            if ignored := report.details.get("start_ignored"):
                reason = (
                    f"{gate.reason}; trained from the start, not as train.start says: {ignored}"
                )
                gate = replace(gate, reason=reason)
            report.gate, report.decision = gate, gate.decision


def gate_one(report: UserReport, config: GateConfig) -> Gate:
    """The gate on the user's validation rows; test rows are reported, never decided on."""

    def valid(who: str) -> SplitLosses | None:
        return report.losses.get(who, {}).get("valid")

    base, candidate = valid("base"), valid("candidate")
    if base is None or candidate is None:
        return Gate(decision="rejected", reason="no validation loss was measured")
    champion = valid("champion")
    if champion is not None and not math.isfinite(champion.nll or 0.0):
        champion = None  # a champion that cannot be scored must not stay for ever
    return decide(
        config,
        base=base,
        candidate=candidate,
        champion=champion,
        seed=seed_of(report.user_key, "gate"),
    )
