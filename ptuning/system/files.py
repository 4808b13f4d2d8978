"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_atomic(target: Path, data: bytes) -> Path:
    """Write a file that a reader or a crash never meets half of, in a directory made if need be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    attempt = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with attempt.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(attempt, target)
    except BaseException:
        attempt.unlink(missing_ok=True)
        raise
    return target
