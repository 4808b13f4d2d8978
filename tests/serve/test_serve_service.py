"""The service on Ray Serve, started as users start it, with two engine replicas."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from serving import Files, prefix_file, save_llama
from waiting import wait_until

from ptuning.champions import wait_acknowledged
from ptuning.errors import ServeError
from ptuning.model.backbone import Backbone
from ptuning.model.load import load_backbone
from ptuning.prefix.artifact import Prefix
from ptuning.store import Store
from ptuning.store_identity import StoreIdentity, open_identity, read_identity
from ptuning.system.ports import free_port
from serve.config import ServeConfig
from serve.http.auth import is_loopback

pytestmark = pytest.mark.slow

LAUNCH = Path(__file__).parent / "launch.py"
MODEL = "tiny"
REFRESH_SECONDS = 1.0
START_SECONDS = 180.0
BODY_SECONDS = 3.0


@dataclass
class Served:
    """A running service, its store, and the library's own view of the same model."""

    process: subprocess.Popen[str]
    address: str
    backbone: Backbone
    files: Files
    identity: StoreIdentity
    output: Path
    clients: dict[str, Any] = field(default_factory=dict)

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        values = {"model": MODEL, "prompt": "hello", "temperature": 0, "max_tokens": 8, **body}
        return httpx.post(self.address + path, json=values, timeout=60)

    def promote(self, user: str, **settings: Any) -> Prefix:
        key = self.identity.user_key(user)
        prefix = prefix_file(self.backbone, user, key=key, **settings)
        self.publish(prefix)
        return prefix

    def publish(self, prefix: Prefix) -> None:
        """Publish, and wait until both replicas answer with it. One killed by a test never will."""
        self.files.promote(prefix)
        store, fingerprint = self.files.store, self.backbone.fingerprint
        folder = f"champions/{fingerprint[:8]}/acks"

        def both() -> bool:
            late = wait_acknowledged(store, fingerprint, self.files.generation, 0)
            return len(store.list(folder)) - len(late) >= 2

        wait_until(both, 60)

    def metric(self, name: str) -> float:
        """The sum of a metric over all replicas and labels."""
        lines = httpx.get(f"{self.address}/metrics", timeout=30).text.splitlines()
        found = [line for line in lines if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)


def start(settings: dict[str, Any], output: Path) -> subprocess.Popen[str]:
    open_identity(Store(settings["store"]))  # as the first run in a store does it
    with output.open("w") as sink:
        return subprocess.Popen(
            [sys.executable, str(LAUNCH), json.dumps(settings)],
            stdout=sink,
            stderr=subprocess.STDOUT,
            text=True,
            # A separate Ray, whatever other tests have started.
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("service")
    model = save_llama(directory / "model", positions=8192)
    store = directory / "store"
    store.mkdir()
    port = free_port()
    settings = {
        "model": str(model),
        "store": str(store),
        "serve": {
            "port": port,
            "model_name": MODEL,
            "max_rows": 4,
            "max_tokens_limit": 6000,
            "refresh_seconds": REFRESH_SECONDS,
            "body_timeout_s": BODY_SECONDS,
            "replicas": 2,
            "num_cpus": 0.5,
            "num_threads": 1,
            "start_timeout_s": START_SECONDS,
        },
    }
    backbone = load_backbone(str(model), dtype="float32", attention="sdpa", device="cpu")
    output = directory / "output.txt"
    process = start(settings, output)
    identity = read_identity(Store(store))
    service = Served(
        process=process,
        address=f"http://127.0.0.1:{port}",
        backbone=backbone,
        files=Files(store),
        identity=identity,
        output=output,
    )
    try:
        wait_until(
            lambda: service.address in output.read_text() or process.poll() is not None,
            START_SECONDS + 30,
        )
        assert process.poll() is None, output.read_text()
        yield service
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(60) == 0, output.read_text()
        finally:
            process.kill()


def test_it_prints_its_address_and_how_to_ask(served: Served) -> None:
    text = served.output.read_text()
    assert f"curl {served.address}/v1/completions" in text
    assert httpx.get(f"{served.address}/healthz").json() == {"status": "ok"}
    ready = httpx.get(f"{served.address}/readyz").json()
    assert ready == {"status": "ok", "replicas_ready": 2, "replicas": 2}


def test_nothing_listens_beyond_loopback(served: Served) -> None:
    launcher = psutil.Process(served.process.pid)
    family = {launcher.pid, *(child.pid for child in launcher.children(recursive=True))}
    listening = [
        (connection.laddr.ip.removeprefix("::ffff:"), psutil.Process(connection.pid).name())
        for connection in psutil.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.pid in family
    ]
    assert len(listening) > 3
    assert [entry for entry in listening if not is_loopback(entry[0])] == []


def test_the_openai_client_works_unmodified(served: Served) -> None:
    prefix = served.promote("alice")
    client = served.openai()
    assert [model.id for model in client.models.list()] == [MODEL]
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        user="alice",
        messages=[{"role": "user", "content": "hello"}],
        temperature=0,
        max_completion_tokens=12,
    )
    assert raw.headers["x-prefix-digest"] == prefix.digest
    answer = raw.parse()
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 12
    assert (answer.model_extra or {})["prefix"]["digest"] == prefix.digest
    text = answer.choices[0].message.content
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            user="alice",
            messages=[{"role": "user", "content": "hello"}],
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert (chunks[0].model_extra or {})["prefix"]["digest"] == prefix.digest
    assert chunks[-1].usage == answer.usage
    completion = client.completions.create(
        model=MODEL, user="alice", prompt="hello", temperature=0, max_tokens=5
    )
    assert completion.choices[0].finish_reason in ("stop", "length")


def test_the_openai_client_raises_its_own_errors(served: Served) -> None:
    client = served.openai()
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="word " * 2000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="x", n=2)


def test_concurrent_users_get_their_own_digests_on_both_replicas(served: Served) -> None:
    users = [f"user{n}" for n in range(8)]
    prefixes = {}
    for n, user in enumerate(users):
        key = served.identity.user_key(user)
        prefixes[user] = prefix_file(served.backbone, user, key=key, length=1 + n, seed=20 + n)
        served.files.promote(prefixes[user])
    served.publish(prefixes["user7"])  # waits until both replicas know them all
    alone = {user: served.post(user=user).json() for user in users}
    assert len({answer["choices"][0]["text"] for answer in alone.values()}) > 4
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda user: (user, served.post(user=user)), users * 5))
    for user, response in together:
        assert response.headers["x-prefix-digest"] == prefixes[user].digest
        assert response.json()["prefix"]["digest"] == prefixes[user].digest
        assert response.json()["choices"] == alone[user]["choices"]
    text = httpx.get(f"{served.address}/metrics").text
    tokens = [line for line in text.splitlines() if line.startswith("ptuning_tokens_generated")]
    assert len(tokens) == 2
    assert all(float(line.rsplit(" ", 1)[1]) > 0 for line in tokens)
    assert not any(user in text for user in users)


def test_a_new_champion_answers_without_a_restart_and_a_running_request_keeps_its_own(
    served: Served,
) -> None:
    old = served.promote("carol", seed=1)
    served.post(user="carol")
    body = {"model": MODEL, "prompt": "hello", "user": "carol", "temperature": 0}
    with httpx.stream(
        "POST",
        f"{served.address}/v1/completions",
        json={**body, "max_tokens": 1500, "stream": True},
        timeout=60,
    ) as running:
        assert running.headers["x-prefix-digest"] == old.digest
        new = served.promote("carol", seed=2)
        promoted = time.monotonic()
        wait_until(lambda: served.post(user="carol").headers["x-prefix-digest"] == new.digest, 20)
        assert time.monotonic() - promoted < REFRESH_SECONDS + 3
        chunks = [line for line in running.iter_lines() if line]
    assert chunks[-1] == "data: [DONE]"
    streamed = "".join(json.loads(c[6:])["choices"][0]["text"] for c in chunks[:-1])
    served.publish(old)
    wait_until(lambda: served.post(user="carol").headers["x-prefix-digest"] == old.digest, 20)
    again = served.post(user="carol", max_tokens=1500).json()["choices"][0]["text"]
    assert streamed == again


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(served: Served, stream: bool) -> None:
    before = served.metric("ptuning_requests_cancelled_total")
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 5900, "stream": stream, "seed": 1}
    data = json.dumps({**body, "logit_bias": {}}).encode()
    host, port = served.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}:{port}\r\n"
        head += f"content-length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        wait_until(lambda: served.metric("ptuning_rows_in_use") == 1)
    wait_until(lambda: served.metric("ptuning_requests_cancelled_total") == before + 1)
    wait_until(lambda: served.metric("ptuning_rows_in_use") == 0)


def send(address: str, data: bytes, timeout_s: float = 30) -> tuple[bytes, float]:
    """Send data on a new socket; return the first bytes of the answer and the seconds it took."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
        connection.sendall(data)
        began = time.monotonic()
        return connection.recv(4096), time.monotonic() - began


def test_a_body_that_stops_coming_is_a_408(served: Served) -> None:
    host = served.address.removeprefix("http://")
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: 100\r\n\r\n{{"
    answer, waited = send(served.address, head.encode())
    assert answer.startswith(b"HTTP/1.1 408"), answer
    assert BODY_SECONDS - 0.5 < waited < BODY_SECONDS + 10


def test_a_foreign_host_or_none_is_a_403_and_nothing_is_computed(served: Served) -> None:
    before = served.metric("ptuning_prompt_tokens_total")
    body = json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": 1})
    for version, host in (("1.1", "host: evil.example\r\n"), ("1.0", "")):
        head = f"POST /v1/completions HTTP/{version}\r\n{host}content-length: {len(body)}\r\n\r\n"
        answer, _ = send(served.address, (head + body).encode())
        assert b" 403 " in answer.splitlines()[0], answer
    assert served.metric("ptuning_prompt_tokens_total") == before


def test_the_official_client_sends_its_own_answer_back(served: Served) -> None:
    client = served.openai()
    user = {"role": "user", "content": "hi"}
    messages: list[Any] = [user]
    for _ in range(3):
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=3)
        messages += [answer.choices[0].message, user]


def test_a_killed_replica_is_replaced_and_nobody_gets_a_wrong_answer(served: Served) -> None:
    prefix = served.promote("dave")
    launcher = psutil.Process(served.process.pid)
    engines = [
        child
        for child in launcher.children(recursive=True)
        if "ServeReplica:ptuning:Engine" in " ".join(child.cmdline())
    ]
    assert len(engines) == 2
    engines[0].kill()
    seen = []

    def healthy() -> bool:
        response = served.post(user="dave")
        seen.append(response.status_code)
        if response.status_code == 200:
            assert response.headers["x-prefix-digest"] == prefix.digest
        else:
            assert response.json()["error"]["code"] == "replica_unavailable"
        # The service is up while one of two replicas is down.
        assert httpx.get(f"{served.address}/healthz", timeout=30).status_code == 200
        ready = httpx.get(f"{served.address}/readyz", timeout=30)
        assert ready.status_code == 200
        return bool(ready.json()["replicas_ready"] == 2 and engines[0].pid not in psutil.pids())

    wait_until(healthy, 90)
    assert served.post(user="dave").status_code == 200


def test_what_is_counted_as_an_error_is_printed_in_a_line_without_texts(served: Served) -> None:
    prefix = served.promote("erin")
    path = served.files.path(prefix)
    path.write_bytes(b"damaged")
    response = served.post(user="erin", prompt="a secret")
    assert response.status_code == 500
    request_id = response.headers["x-ptuning-request-id"]
    wait_until(lambda: f"request {request_id}: failed with 500" in served.output.read_text())
    assert served.metric("ptuning_prefix_errors_total") == 1
    text = served.output.read_text()
    assert prefix.digest in text
    assert "secret" not in text
    assert "erin" not in text


def test_a_port_in_use_is_said_before_anything_starts(served: Served, tmp_path: Path) -> None:
    from ptuning.model.facts import BackboneConfig
    from serve.app import run

    port = int(served.address.rsplit(":", 1)[1])
    with pytest.raises(ServeError, match=r"serve\.port"):
        run(
            ServeConfig(port=port, model_name=MODEL),
            store=str(tmp_path),
            backbone=BackboneConfig(name=served.backbone.name),
        )


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A service that cannot come back, and its output: its engine was killed, and its model is
    damaged. It waits for 40 s before it gives up."""
    folder = tmp_path_factory.mktemp("lost")
    model, port, output = save_llama(folder / "model"), free_port(), folder / "output.txt"
    settings = {
        "model": str(model),
        "store": str(folder),
        "serve": {"port": port, "model_name": MODEL, "start_timeout_s": 40, "num_threads": 1},
    }
    process = start(settings, output)
    try:
        wait_until(lambda: f":{port}" in output.read_text() or process.poll() is not None, 120)
        assert process.poll() is None, output.read_text()
        (model / "model.safetensors").write_bytes(b"no weights")
        [engine] = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "ServeReplica:ptuning:Engine" in " ".join(child.cmdline())
        ]
        engine.kill()
        yield process, output
    finally:
        process.kill()


@pytest.mark.usefixtures("lost")  # it gives up meanwhile
def test_a_model_that_cannot_be_served_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"no weights")
    settings = {
        "model": str(model),
        "store": str(tmp_path),
        "serve": {"port": free_port(), "model_name": MODEL, "start_timeout_s": 120},
    }
    output = tmp_path / "output.txt"
    process = start(settings, output)
    try:
        assert process.wait(150) == 1
    finally:
        process.kill()
    text = output.read_text()
    assert "ServeError: the service did not become healthy" in text
    assert "safetensors" in text.lower() or "header" in text.lower()


def test_a_service_that_cannot_come_back_ends_the_process_with_its_reason(
    lost: tuple[subprocess.Popen[str], Path],
) -> None:
    process, output = lost
    assert process.wait(180) == 1
    text = output.read_text()
    assert "ServeError: the service has" in text
    assert "safetensors" in text.lower() or "header" in text.lower()
