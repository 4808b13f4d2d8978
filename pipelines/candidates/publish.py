"""Publish what a run promoted."""

from __future__ import annotations

from collections.abc import Mapping

from ptuning.errors import RunError
from ptuning.registry.base import Registry


def deploy(registry: Registry, promoted: Mapping[str, str], prefix_name: str) -> None:
    """Check that what the service will read is what this run promoted (user key to digest).

    Nothing is pushed: a running service looks the `champion` alias up at least every
    `serve.refresh_seconds`, so the alias is the deployment. Raises RunError where an alias
    does not point at the promoted prefix.
    """
    current = registry.current(promoted, prefix_name)
    astray = []
    for key, digest in promoted.items():
        now = current.get(key)
        champion = now.champion if now else None
        if champion is None or champion.digest != digest:
            astray.append(key)
    if astray:
        raise RunError(
            "promoted prefixes are not the registry's champions",
            seen=f"{len(astray)} of {len(promoted)} users, such as {astray[0]}",
            fix="another run may have promoted meanwhile; run again to compare with it",
        )
