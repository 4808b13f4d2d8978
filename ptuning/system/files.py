"""Write local files atomically, even if the process is killed while writing."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import time
import uuid
from pathlib import Path

_STALE_SECONDS = 24 * 3600
_ATTEMPT = re.compile(r"(\d+)-(\d+)-[0-9a-f]{32}-(.+)\.tmp")  # time, process, host


def write_atomic(
    target: str | os.PathLike[str], data: bytes, attempts: str | os.PathLike[str] | None = None
) -> Path:
    """Write or replace a file atomically, and create its directory if necessary.

    The data is synced before the file is renamed, so even after a power cut a reader finds either
    the old file or the new one. Until then it lies in the folder `attempts`, on the same file
    system, or beside the target.
    """
    path = Path(target)
    attempt = _write_attempt(path, data, attempts)
    try:
        os.replace(attempt, path)
    except OSError as error:
        attempt.unlink(missing_ok=True)
        if error.errno == errno.EXDEV and attempts is not None:  # a folder on another volume
            return write_atomic(target, data)
        raise
    except BaseException:
        attempt.unlink(missing_ok=True)
        raise
    return path


def write_new(
    target: str | os.PathLike[str], data: bytes, attempts: str | os.PathLike[str] | None = None
) -> bool:
    """Write a file unless it exists; returns whether this call wrote it.

    If several processes race, exactly one writes. `attempts` is as in `write_atomic`.
    """
    path = Path(target)
    attempt = _write_attempt(path, data, attempts)
    try:
        os.link(attempt, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno == errno.EXDEV and attempts is not None:
            return write_new(target, data)
        raise
    finally:
        attempt.unlink(missing_ok=True)
    return True


def sweep_attempts(attempts: str | os.PathLike[str]) -> None:
    """Remove what dead processes left in a folder of attempts. What living processes of this host
    write is not touched, nor what another host wrote less than a day ago."""
    for attempt in Path(attempts).glob("*.tmp"):
        if not _is_alive(attempt.name):
            attempt.unlink(missing_ok=True)


def _is_alive(attempt: str) -> bool:
    if (named := _ATTEMPT.fullmatch(attempt)) is None:
        return True  # not ours
    began, pid, host = named.groups()
    if host != socket.gethostname():
        return time.time() - int(began) < _STALE_SECONDS
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_attempt(path: Path, data: bytes, attempts: str | os.PathLike[str] | None) -> Path:
    """Write the data to a new file whose name tells its writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent if attempts is None else Path(attempts)
    folder.mkdir(parents=True, exist_ok=True)
    writer = f"{int(time.time())}-{os.getpid()}-{uuid.uuid4().hex}-{socket.gethostname()}"
    attempt = folder / f"{writer}.tmp"
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
