"""A pack's record: the outcome for its users, as JSON. Writing it commits the pack.

It keeps every row's loss, so that a changed gate can judge the same prefixes without training or
scoring them again. If a pack is split because its worker died, a split record takes the place of
the done-record: whichever is written first counts, so a late worker cannot commit a split pack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ptuning.types import Gate, SplitLosses, UserReport


@dataclass(frozen=True, kw_only=True)
class DoneRecord:
    """The outcome of one pack. `champions` are the digests of the champions that candidates were
    compared with, None for users without one; `attempt` names the process that wrote it.
    `seconds` is the worker's time, of which `evaluate_seconds` followed the training of its last
    user: for saving, scoring and gating."""

    pack_id: str
    attempt: str
    seconds: float
    evaluate_seconds: float = 0.0
    champions: Mapping[str, str | None]
    reports: tuple[UserReport, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "pack_id": self.pack_id,
            "attempt": self.attempt,
            "seconds": self.seconds,
            "evaluate_seconds": self.evaluate_seconds,
            "champions": dict(self.champions),
            "users": [_report_to_json(report) for report in self.reports],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DoneRecord:
        return cls(
            pack_id=value["pack_id"],
            attempt=value["attempt"],
            seconds=value["seconds"],
            evaluate_seconds=value["evaluate_seconds"],
            champions=value["champions"],
            reports=tuple(_report_from_json(user) for user in value["users"]),
        )


@dataclass(frozen=True, kw_only=True)
class SplitRecord:
    """A pack that was cut after its worker died: the users, by key, of each part. The parts are
    packs, with records of their own."""

    pack_id: str
    parts: tuple[tuple[str, ...], ...]

    def to_json(self) -> dict[str, Any]:
        return {"pack_id": self.pack_id, "split": [list(part) for part in self.parts]}


def record_from_json(value: Mapping[str, Any]) -> DoneRecord | SplitRecord:
    """Either record, by what is in it."""
    if "split" in value:
        parts = tuple(tuple(part) for part in value["split"])
        return SplitRecord(pack_id=value["pack_id"], parts=parts)
    return DoneRecord.from_json(value)


_SPECIAL = ("history", "losses", "gate")  # fields of a report with a JSON form of their own


def _report_to_json(report: UserReport) -> dict[str, Any]:
    names = [field.name for field in fields(report)]
    value = {name: getattr(report, name) for name in names if name not in _SPECIAL}
    history = [
        {name: _finite(loss) for name, loss in dict(epoch).items()} for epoch in report.history
    ]
    gate = None if report.gate is None else asdict(report.gate)
    return {**value, "history": history, "losses": losses_to_json(report), "gate": gate}


def _report_from_json(value: Mapping[str, Any]) -> UserReport:
    gate = None if value["gate"] is None else Gate(**value["gate"])
    return UserReport(**{**value, "losses": losses_from_json(value["losses"]), "gate": gate})


def _finite(loss: object) -> object:
    """The loss, or None if it is not finite, since JSON has no NaN; a failed user's error has the
    details."""
    return None if isinstance(loss, float) and not math.isfinite(loss) else loss


def losses_to_json(report: UserReport) -> dict[str, dict[str, dict[str, list[Any]]]]:
    """Losses as JSON, which has no NaN: null stands for a loss that is not finite."""
    return {
        name: {
            split: {
                "nats": [nats if math.isfinite(nats) else None for nats in loss.nats],
                "tokens": list(loss.tokens),
            }
            for split, loss in splits.items()
        }
        for name, splits in report.losses.items()
    }


def losses_from_json(value: Mapping[str, Any]) -> dict[str, dict[str, SplitLosses]]:
    """The inverse of `losses_to_json`."""
    return {
        name: {
            split: SplitLosses(
                nats=tuple(math.nan if nats is None else float(nats) for nats in loss["nats"]),
                tokens=tuple(int(count) for count in loss["tokens"]),
            )
            for split, loss in splits.items()
        }
        for name, splits in value.items()
    }
