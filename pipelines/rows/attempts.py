"""Temporary folders of work in progress, named after their process and removed once it is dead.

A killed run leaves its folder behind. The next run of the same work removes it, but not folders
that another process is still writing.
"""

from __future__ import annotations

import os
import socket
import time
import uuid

from ptuning.store import Store

_PREFIX = "_attempt"  # readers of Parquet folders skip names that begin with _
_STALE_SECONDS = 24 * 3600


def new_attempt(folder: str) -> str:
    """A unique name below `folder`; nothing is created yet."""
    owner = f"{int(time.time())}-{os.getpid()}-{uuid.uuid4().hex[:8]}-{socket.gethostname()}"
    return f"{folder}/{_PREFIX}-{owner}"


def sweep(store: Store, folder: str) -> None:
    """Remove what dead processes left below `folder`, including half-written files.

    Attempts of living processes are not touched. An attempt from another host counts as dead after
    a day.
    """
    attempts = [name for name in store.list(folder) if name.startswith(f"{_PREFIX}-")]
    living = [name for name in attempts if _alive(name)]
    for name in set(attempts) - set(living):
        remove(store, f"{folder}/{name}")
    if not living:
        for name in store.fs.find(store.path(folder)):
            if name.endswith(".tmp"):
                store.fs.rm_file(name)


def _alive(attempt: str) -> bool:
    began, pid, _, host = attempt.removeprefix(f"{_PREFIX}-").split("-", 3)
    if host != socket.gethostname():
        return time.time() - int(began) < _STALE_SECONDS
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove(store: Store, name: str) -> None:
    if store.exists(name):
        store.fs.rm(store.path(name), recursive=True)
