"""An encoder-decoder backbone and an ensemble of prompts: rows, a run, Ray Serve, answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from asking import answered_digest, client_of
from runs import config_of, user_rows, users_of, write_rows
from tiny_model import save_encoder_decoder

from pipelines.report.progress import RunProgress
from pipelines.run import execute
from ptuning.store import Store
from ptuning.system.ports import free_port
from serve.app import run as run_service

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

USERS = ("ann", "bob", "cy")


def test_an_encoder_decoder_backbone_and_an_ensemble_of_prompts_go_the_same_way(
    tmp_path: Path,
) -> None:
    """The commands do the same in processes of their own (test_run_command.py)."""
    model, store = tmp_path / "bart", tmp_path / "store"
    save_encoder_decoder(model)
    data = write_rows(tmp_path / "rows.jsonl", [row for u in USERS for row in user_rows(u, 9)])
    method = ("method.type=prompt", "method.ensemble=2", "method.init=vocab")
    low = ("gate.min_gain=-10", "data.min_examples=8", f"serve.port={free_port()}")
    config = config_of(model, *low, *method)
    with RunProgress() as progress:
        facts = execute([str(data)], Store(store), config, progress)
    users = {row["user_id"]: row["digest"] for row in users_of(store, facts.run_id)}
    with run_service(
        config.serve, store=str(store), backbone=config.backbone, blocking=False
    ) as running:
        client, asked = client_of(running.address), [*USERS, "nobody"] * 3
        with ThreadPoolExecutor(len(asked)) as pool:
            digests = list(pool.map(lambda user: answered_digest(client, user), asked))
    for user, digest in zip(asked, digests, strict=True):
        assert digest == (users[user] if user in USERS else "base"), user
