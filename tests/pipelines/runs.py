"""Rows and settings of small runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipelines.config import RunConfig, load_config
from pipelines.gangs.cluster import identify_backbone
from pipelines.opening import reach_registry
from pipelines.run_folder import RunFolder
from ptuning.registry.base import Registry
from ptuning.store import Store
from ptuning.store_identity import open_identity

WORDS = ("alpha", "beta", "gamma", "delta", "kappa", "omega")


def user_rows(user: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of one user who always answers with the same two words, which can be learned."""
    picker = random.Random(f"{user}{seed}")
    said = " ".join(picker.sample(WORDS, 2))
    return [
        {
            "user_id": user,
            "prompt": f"say it {picker.randrange(100)}",
            "completion": said,
            "timestamp": n,
        }
        for n in range(count)
    ]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    mixed = list(rows)
    random.Random(1).shuffle(mixed)
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    return path


def settings(model: Path, *more: str) -> list[str]:
    return [
        f"backbone.name={model}",
        "backbone.dtype=float32",
        "method.num_virtual_tokens=4",
        "train.epochs=2",
        "ray.cpus_per_worker=1",
        "ray.workers=1",
        *more,
    ]


def users_of(store: Path, run_id: str) -> list[dict[str, Any]]:
    """The rows of a run's users table."""
    rows: list[dict[str, Any]] = RunFolder(Store(store), run_id).read_users().to_pylist()
    return rows


def registry_of(store: Path | str, config: RunConfig) -> Registry:
    """The registry of a run with `config` in this store."""
    place = Store(store)
    fingerprint = identify_backbone(config).fingerprint
    return reach_registry(config, place, open_identity(place), fingerprint)


def config_of(model: Path, *more: str) -> RunConfig:
    return load_config(None, settings(model, *more), {})


def command(data: Path, store: Path, model: Path, *more: str) -> list[str]:
    """The command line of `ptuning run`, as a user would start it."""
    sets = [part for setting in settings(model, *more) for part in ("--set", setting)]
    return [
        sys.executable,
        "-c",
        "from pipelines.cli import main; main()",
        "run",
        "--data",
        str(data),
        "--store",
        str(store),
        *sets,
    ]


def start(arguments: Sequence[str], log: Path, **more: str) -> subprocess.Popen[bytes]:
    """Start a driver in a Ray cluster of its own, whatever cluster the tests use. `more` is added
    to its environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    with log.open("wb") as output:
        return subprocess.Popen(
            arguments, stdout=output, stderr=subprocess.STDOUT, env={**environment, **more}
        )
