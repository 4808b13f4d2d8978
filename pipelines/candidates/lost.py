"""Prefix files that are gone or damaged, looked for in a sample of users each run.

Every file of a million users would be 0.7 TB to read a night, for what hardly ever happens. So
each run reads the files of some users, others each time; a service that meets a bad file
refuses it by its digest, counts it (`ptuning_prefix_errors_total`) and answers 503, never with
another prefix. Whoever is found here trains again and has a whole file.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ptuning.registry.base import Current, Registry
from ptuning.store import Store, prefix_path

SAMPLE = 256  # users a run: below a second on a local disk


def find_lost(
    store: Store, registry: Registry, user_keys: Sequence[str], prefix_name: str, seed: str
) -> frozenset[str]:
    """Keys of sampled users whose candidate's or champion's file cannot be read or is not what
    its digest says. Up to SAMPLE users are all looked at; of more, a draw by `seed`."""
    keys = list(user_keys)
    if len(keys) > SAMPLE:
        keys = random.Random(seed).sample(keys, SAMPLE)
    current = registry.current(keys, prefix_name)
    with ThreadPoolExecutor(8) as pool:
        whole = pool.map(lambda key: _is_whole(store, current[key]), current)
        return frozenset(key for key, good in zip(current, whole, strict=True) if not good)


def _is_whole(store: Store, now: Current) -> bool:
    versions = [version for version in (now.candidate, now.champion) if version is not None]
    for key, digest in {(version.user_key, version.digest) for version in versions}:
        try:
            data = store.read(prefix_path(key, digest))
        except OSError:
            return False
        if hashlib.sha256(data).hexdigest() != digest:
            return False
    return True
