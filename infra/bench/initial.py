"""Compare initialisations and parametrisations of Prefix Tuning at equal numbers of steps.

    python -m infra.bench.initial --data ../shared/data/ubuntu-irc.parquet [--users 6]

Trains the same users with every setting and prints the median validation loss in nats per
completion token: of the base model, and of the first, the last and the best epoch. Users are ranked
by their number of rows. The first 16 are skipped, so that no setting is chosen on users that other
figures are reported for.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq
import torch

import ptuning
from ptuning.data.examples import arrange

SETTINGS: dict[str, tuple[dict[str, object], float]] = {
    "keys and values, words, 3e-2": ({}, 3e-2),
    "keys and values, given words, 3e-2": (
        {"init_text": "This person writes to others in a chat and answers like this:"},
        3e-2,
    ),
    "keys and values, words, 2e-2": ({}, 2e-2),
    "keys and values, words, 1e-2": ({}, 1e-2),
    "keys and values, random, 3e-2": ({"init": "random"}, 3e-2),
    "MLP 512, words, 3e-4": ({"encoder_hidden_size": 512}, 3e-4),
    "MLP 512, words, 1e-3": ({"encoder_hidden_size": 512}, 1e-3),
    "MLP 512, random, 3e-4": ({"encoder_hidden_size": 512, "init": "random"}, 3e-4),
    "MLP 512, random, 1e-3": ({"encoder_hidden_size": 512, "init": "random"}, 1e-3),
}


def read_users(path: Path, skip: int, count: int, rows: int) -> dict[str, list[ptuning.Example]]:
    """The newest `rows` rows of `count` users, ranked by their number of rows; the first `skip`
    users are left out."""
    table = pq.read_table(path).to_pylist()
    ranked = Counter(row["user_id"] for row in table)
    chosen = [user for user, _ in sorted(ranked.items(), key=lambda item: (-item[1], item[0]))]
    wanted = set(chosen[skip : skip + count])
    users: dict[str, list[ptuning.Example]] = defaultdict(list)
    for row in table:
        if row["user_id"] in wanted and row["split"] != "test":
            users[row["user_id"]].append(
                ptuning.Example(
                    prompt=row["prompt"],
                    completion=row["completion"],
                    split=row["split"],
                    timestamp=int(row["timestamp"].timestamp() * 1000),
                )
            )
    return {user: arrange(examples, rows) for user, examples in users.items()}


def measure(
    backbone: ptuning.Backbone,
    users: dict[str, list[ptuning.Example]],
    method: dict[str, object],
    learning_rate: float,
    epochs: int,
) -> dict[str, float]:
    begin = time.monotonic()
    result = ptuning.tune(
        backbone,
        users,
        method=ptuning.PrefixTuning(**method),
        train=ptuning.TrainConfig(epochs=epochs, learning_rate=learning_rate, patience=None),
    )
    histories = [one.history for one in result.values() if one.status == "trained"]
    valid = [[epoch["valid"] or 0.0 for epoch in history] for history in histories]
    return {
        "first_epoch": median(losses[0] for losses in valid),
        "last_epoch": median(losses[-1] for losses in valid),
        "best_epoch": median(min(losses) for losses in valid),
        "failed": len(users) - len(histories),
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--users", type=int, default=6)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="only settings whose name matches"
    )
    parser.add_argument("--out", type=Path, help="write the figures to this file as JSON too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    backbone = ptuning.load_backbone("smollm2")
    users = read_users(options.data, 16, options.users, options.rows)
    base = median(
        ptuning.nll(backbone, [e for e in examples if e.split == "valid"])
        for examples in users.values()
    )
    print(f"{len(users)} users, base {base:.3f} nats per token, {backbone.dtype}", flush=True)
    figures = {}
    for name, (method, rate) in SETTINGS.items():
        if not re.search(options.only, name):
            continue
        figures[name] = measure(backbone, users, method, rate, options.epochs)
        print(f"{name:36s} {json.dumps(figures[name])}", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"base": base, "settings": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
