"""Publish a run's promotions and retirements, and check that they are being served."""

from __future__ import annotations

from ptuning.champions import ChampionList, Changes, publish, wait_acknowledged
from ptuning.errors import RunError
from ptuning.store import Store

_SLACK_S = 3.0  # beyond a replica's refresh interval: time to read the change and acknowledge it


def deploy(
    store: Store, fingerprint: str, changes: Changes, refresh_seconds: float
) -> tuple[int, list[str]]:
    """Publish a generation, read it back, and wait for the replicas that serve this backbone.

    `changes` maps (user key, prefix name) to the new champion, or None to remove it;
    `refresh_seconds` is how often replicas poll. Returns the generation and the names of replicas
    that do not serve it yet. Raises RunError if the list read back does not have these changes,
    because another run has decided about the same users meanwhile.
    """
    generation = publish(store, fingerprint, changes)
    champions = ChampionList(store, fingerprint)
    champions.refresh()
    _check(champions, changes)
    if not changes:
        return generation, []
    late = wait_acknowledged(store, fingerprint, generation, refresh_seconds + _SLACK_S)
    return generation, late


def _check(champions: ChampionList, changes: Changes) -> None:
    wrong = [name for name, ref in changes.items() if champions.get(*name) != ref]
    if wrong:
        raise RunError(
            "the published champions are not those that this run decided on",
            seen=f"{len(wrong)} of {len(changes)} users, such as {wrong[0][0]}",
            expected="the champions that this run published",
            fix="another run published meanwhile; run again to compare with it",
        )
