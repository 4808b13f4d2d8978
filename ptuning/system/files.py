"""Write local files atomically, even if the process is killed while writing."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


def write_atomic(target: str | os.PathLike[str], data: bytes) -> Path:
    """Write or replace a file atomically, and create its directory if necessary.

    The data is synced before the file is renamed, so even after a power cut a reader finds either
    the old file or the new one.
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
    """Write a file unless it exists; returns whether this call wrote it.

    If several processes race, exactly one writes.
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
    """Write the data to a new file beside `path`, with a unique name."""
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
