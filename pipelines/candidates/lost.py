"""Check the prefix files of a sample of users for missing or damaged files.

Reading every file of a million users would be 0.7 TB a night, for something that hardly ever
happens. So each run checks the files of a few users, different ones each time. A service that reads
a bad file refuses it by its digest, counts it (`ptuning_prefix_errors_total`) and answers 503,
never with another prefix. Users found here are trained again.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ptuning.registry.base import Current, Registry
from ptuning.store import Store, prefix_path

SAMPLE = 256  # users per run: less than a second on a local disk


def find_lost(
    store: Store, registry: Registry, user_keys: Sequence[str], prefix_name: str, seed: str
) -> frozenset[str]:
    """Keys of users whose candidate's or champion's file cannot be read or does not match its
    digest. Checks all users if there are at most SAMPLE, otherwise a sample drawn with `seed`."""
    keys = list(user_keys)
    if len(keys) > SAMPLE:
        keys = random.Random(seed).sample(keys, SAMPLE)
    current = registry.current(keys, prefix_name)
    with ThreadPoolExecutor(8) as pool:
        intact = pool.map(lambda key: _is_intact(store, current[key]), current)
        return frozenset(key for key, good in zip(current, intact, strict=True) if not good)


def _is_intact(store: Store, now: Current) -> bool:
    versions = [version for version in (now.candidate, now.champion) if version is not None]
    for key, digest in {(version.user_key, version.digest) for version in versions}:
        try:
            data = store.read(prefix_path(key, digest))
        except OSError:
            return False
        if hashlib.sha256(data).hexdigest() != digest:
            return False
    return True
