"""Publish what a run promoted and retired, and see that it is what answers."""

from __future__ import annotations

from ptuning.champions import ChampionList, Changes, publish, wait_acknowledged
from ptuning.errors import RunError
from ptuning.store import Store

_SLACK_S = 3.0  # beyond a replica's own interval: reading the change, and writing that it did


def deploy(
    store: Store, fingerprint: str, changes: Changes, refresh_seconds: float
) -> tuple[int, list[str]]:
    """Publish a generation, read it back, and wait for the replicas that serve this backbone.

    `changes`: (user key, prefix name) to the new champion, None where there is none any more;
    `refresh_seconds` is how often replicas look. Returns the generation and the names of replicas
    that do not answer from it yet. Raises RunError where what is read back is not what was
    published: another run decided about the same users meanwhile.
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
            "what is served is not what this run decided",
            seen=f"{len(wrong)} of {len(changes)} users, such as {wrong[0][0]}",
            expected="the champions that this run published",
            fix="another run published meanwhile; run again to compare with it",
        )
