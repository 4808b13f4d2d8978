"""Local files that appear whole or not at all, whoever is killed while they are written."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


def write_atomic(target: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file in a directory that is made if need be; what was there is replaced at once.

    The data is on disk before the name is: after a power cut too, a reader finds the old file
    or the new one.
    """
    path = Path(target)
    attempt = _write_attempt(path, data)
    try:
        os.replace(attempt, path)
    except BaseException:
        attempt.unlink(missing_ok=True)
        raise
    return path


def write_new(target: str | os.PathLike[str], data: bytes) -> bool:
    """Write a file unless its name is taken; says whether this call wrote it.

    Of processes that race, exactly one writes.
    """
    path = Path(target)
    attempt = _write_attempt(path, data)
    try:
        os.link(attempt, path)
    except FileExistsError:
        return False
    finally:
        attempt.unlink(missing_ok=True)
    return True


def _write_attempt(path: Path, data: bytes) -> Path:
    """The data under a name beside `path` that no other attempt has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with attempt.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            attempt.unlink()
        raise
    return attempt
