"""Where this machine caches what it can recompute: converted models, digests, probe results."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$PTUNING_CACHE`, else `ptuning` in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PTUNING_CACHE") or Path(home) / "ptuning")
