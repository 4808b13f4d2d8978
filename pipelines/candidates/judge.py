"""Gate a run's candidates: only a user's losses decide about that user's prefix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ptuning.gate import GateConfig, GateInput, decide
from ptuning.types import UserReport


def gate_all(reports: Iterable[UserReport], config: GateConfig) -> None:
    """Set `gate` and `decision` of every trained user, whether their losses are of this run or of
    an earlier one (rejudge.py)."""
    for report in reports:
        if report.status == "trained":
            gate = decide(config, GateInput.of(report))
            if ignored := report.details.get("champion_ignored"):
                gate = replace(gate, reason=f"{gate.reason}; the champion did not count: {ignored}")
            if ignored := report.details.get("start_ignored"):
                reason = (
                    f"{gate.reason}; trained from the start, train.start was ignored: {ignored}"
                )
                gate = replace(gate, reason=reason)
            report.gate, report.decision = gate, gate.decision
