"""The whole path of a user: `ptuning run`, `ptuning serve`, the official OpenAI client."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pyarrow.parquet as pq
import pytest
from runs import command, settings, start, user_rows, write_rows
from tiny_model import save_encoder_decoder

from ptuning.system.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

USERS = ("ann", "bob", "cy")


def _run(data: Path, store: Path, model: Path, log: Path, *more: str) -> dict[str, Any]:
    # A low threshold: this tests the path of a prefix, not its quality.
    low = ("gate.min_gain=-10", "data.min_examples=8", *more)
    process = start(command(data, store, model, *low), log)
    try:
        code = process.wait(timeout=300)
    finally:
        process.kill()
    assert code == 0, log.read_text()[-3000:]
    newest = max(store.glob("runs/*/summary.json"))
    table = pq.read_table(newest.parent / "users").to_pylist()
    return {row["user_id"]: row for row in table}


@pytest.fixture(scope="module")
def served(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path, str, dict[str, Any]]]:
    """A store with three promoted users, and the address of `ptuning serve` on it."""
    folder = tmp_path_factory.mktemp("e2e")
    rows = [row for user in USERS for row in user_rows(user, 10)] + user_rows("few", 3)
    data, store = write_rows(folder / "rows.jsonl", rows), folder / "store"
    users = _run(data, store, tiny_model_dir, folder / "run.log")
    with _service(store, tiny_model_dir, folder / "serve.log", free_port()) as address:
        yield data, store, address, users


@contextlib.contextmanager
def _service(store: Path, model: Path, log: Path, port: int) -> Iterator[str]:
    """The address of `ptuning serve` on a store."""
    sets = [part for one in settings(model) for part in ("--set", one)]
    arguments = [sys.executable, "-m", "pipelines", "serve", "--store", str(store), *sets]
    process = start([*arguments, "--set", "serve.refresh_seconds=1", "--port", str(port)], log)
    try:
        yield _address(process, log, port)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def _address(process: subprocess.Popen[bytes], log: Path, port: int) -> str:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        text = log.read_text()
        if found := re.search(rf"http://127\.0\.0\.1:{port}", text):
            return found.group()
        assert process.poll() is None, text[-3000:]
        time.sleep(0.2)
    return pytest.fail(f"the service did not start: {log.read_text()[-3000:]}")


def _client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


def _digest(client: openai.OpenAI, user: str) -> str:
    (model,) = client.models.list().data
    raw = client.chat.completions.with_raw_response.create(
        model=model.id,
        messages=[{"role": "user", "content": "say it"}],
        user=user,
        max_tokens=4,
        temperature=0,
    )
    body = json.loads(raw.text)
    header = raw.headers["x-prefix-digest"]
    assert header == (body["prefix"]["digest"] if body["prefix"] else "base")
    return str(header)


def test_everybody_is_answered_with_the_prefix_that_the_run_made_for_them(
    served: tuple[Path, Path, str, dict[str, Any]],
) -> None:
    _, _, address, users = served
    client = _client(address)
    asked = [*USERS, "few", "nobody"] * 4
    with ThreadPoolExecutor(len(asked)) as pool:
        digests = list(pool.map(lambda user: _digest(client, user), asked))
    for user, digest in zip(asked, digests, strict=True):
        expected = users[user]["digest"] if user in USERS else "base"
        assert digest == expected, user


def test_new_rows_reach_the_running_service_as_a_new_prefix(
    served: tuple[Path, Path, str, dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    data, store, address, before = served
    more = [json.loads(line) for line in data.read_text().splitlines()] + user_rows("bob", 4, 7)
    after = _run(write_rows(tmp_path / "more.jsonl", more), store, tiny_model_dir, tmp_path / "log")
    assert after["ann"]["status"] == "unchanged"
    assert after["bob"]["digest"] != before["bob"]["digest"]
    client, deadline = _client(address), time.monotonic() + 60
    while _digest(client, "bob") != after["bob"]["digest"]:
        assert time.monotonic() < deadline, "the service still answers with the old prefix"
        time.sleep(0.2)
    assert _digest(client, "ann") == before["ann"]["digest"]


def test_an_encoder_decoder_backbone_and_an_ensemble_of_prompts_go_the_same_way(
    tmp_path: Path,
) -> None:
    model = tmp_path / "bart"
    save_encoder_decoder(model)
    data = write_rows(tmp_path / "rows.jsonl", [row for u in USERS for row in user_rows(u, 9)])
    method = ("method.type=prompt", "method.ensemble=2", "method.init=vocab")
    users = _run(data, tmp_path / "store", model, tmp_path / "run.log", *method)
    with _service(tmp_path / "store", model, tmp_path / "serve.log", free_port()) as address:
        client, asked = _client(address), [*USERS, "nobody"] * 3
        with ThreadPoolExecutor(len(asked)) as pool:
            digests = list(pool.map(lambda user: _digest(client, user), asked))
    for user, digest in zip(asked, digests, strict=True):
        assert digest == (users[user]["digest"] if user in USERS else "base"), user
