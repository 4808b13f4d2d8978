"""Judge existing prefixes with a changed gate, from the losses that their training recorded.

A version names the run and the pack that judged it last, and that pack's done-record has every
row's loss. The cost is O(packs touched), and nothing is trained or scored. A user whose losses are
gone, or whose candidate was never compared with the current champion, trains again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from pipelines.done_record import DoneRecord
from pipelines.plan import Pack, PlannedUser
from pipelines.run_folder import RunFolder
from ptuning.errors import RunError
from ptuning.store import Store
from ptuning.types import UserReport


def find_losses(store: Store, packs: Iterable[Pack]) -> dict[str, tuple[UserReport, str | None]]:
    """By user key, the report with the stored losses, and the digest of the champion that the
    candidate was compared with. Users whose losses cannot be used are absent."""
    wanted: dict[tuple[str, str], list[PlannedUser]] = defaultdict(list)
    for pack in packs:
        for user in pack.users:
            wanted[user.run_id, user.pack_id].append(user)
    found: dict[str, tuple[UserReport, str | None]] = {}
    for (run_id, pack_id), users in wanted.items():
        record = _read(store, run_id, pack_id)
        if record is None:
            continue
        reports = {report.user_key: report for report in record.reports}
        for user in users:
            report, compared = reports.get(user.user_key), record.champions.get(user.user_key)
            if report is not None and (usable := stored_report(user, report, compared)):
                found[user.user_key] = usable, compared
    return found


def stored_report(user: PlannedUser, report: UserReport, compared: str | None) -> UserReport | None:
    """The report to judge by, or None if its losses do not answer today's question.

    `compared` is the champion whose losses are in the report. The current champion must be the
    same, or the candidate itself (it won), or none (then only the base is a rival).
    """
    if report.digest is None or report.digest != user.candidate_digest:
        return None
    if user.champion_digest is None:
        losses = {name: splits for name, splits in report.losses.items() if name != "champion"}
        return replace(report, losses=losses)
    return report if user.champion_digest in (compared, report.digest) else None


def records_of(
    packs: Iterable[Pack], losses: Mapping[str, tuple[UserReport, str | None]]
) -> list[DoneRecord]:
    """Done-records for the judging run, which must keep the losses because its versions name it."""
    return [
        DoneRecord(
            pack_id=pack.pack_id,
            attempt="judged again",
            seconds=0.0,
            champions={user.user_key: losses[user.user_key][1] for user in pack.users},
            reports=tuple(losses[user.user_key][0] for user in pack.users),
        )
        for pack in packs
    ]


def _read(store: Store, run_id: str, pack_id: str) -> DoneRecord | None:
    try:
        return RunFolder(store, run_id).read_done(pack_id)
    except (RunError, OSError, KeyError, TypeError):
        return None  # a damaged record counts as missing: the user trains again
