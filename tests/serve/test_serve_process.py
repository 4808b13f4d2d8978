"""How the service starts, stays on loopback, logs, and notices that it is dead."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ptuning.errors import ServeError
from ptuning.model.facts import BackboneConfig
from serve.config import ServeConfig
from serve.logs import LOGGER, Follower, append_to, describe


def test_a_running_service_is_given_up_when_it_is_gone_or_silent_for_too_long() -> None:
    from serve.app import find_death

    assert find_death("RUNNING", 0, 300) is None
    # A replica that is being replaced may take as long as a start.
    assert find_death("UNHEALTHY", 299, 300) is None
    assert find_death("UNHEALTHY", 301, 300) == "the service has not answered for 301 s"
    assert find_death("DEPLOYING", 301, 300)
    for state in ("ABSENT", "DEPLOY_FAILED", "DELETING"):
        assert find_death(state, 0, 300) == "the service has died"
    assert find_death("UNKNOWN", 5, 300) is None
    assert find_death("UNKNOWN", 31, 300)


def test_a_replica_reserves_one_gpu_where_ray_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from serve.app import _gpus_of

    def gpus(present: float, device: str = "auto", **settings: float) -> float:
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": present})
        return _gpus_of(ServeConfig(**settings), BackboneConfig(name="x", device=device))

    assert gpus(2) == 1
    assert gpus(2, "cuda:1") == 1
    assert gpus(0) == 0
    assert gpus(2, "cpu") == 0
    assert gpus(2, num_gpus=0.25) == 0.25
    assert gpus(2, num_gpus=0) == 0


PRIVATE = """
import ray, ray.serve._private.replica, ray._private.ray_constants
from serve import local_ray
from ptuning.errors import PTuningError
del {name}
ray.util.get_node_ip_address = lambda: "127.0.0.1"
try:
    {call}
except PTuningError as error:
    print("refused:", error)
else:
    print("went on")
assert not ray.is_initialized()
"""


@pytest.mark.parametrize(
    ("name", "call"),
    [
        (
            "ray.serve._private.replica.add_port_to_grpc_server",
            "local_ray.keep_replica_on_loopback()",
        ),
        ("ray._private.ray_constants.ENABLE_RAY_CLUSTER", "local_ray.start_ray(1)"),
    ],
)
def test_a_ray_that_has_renamed_a_switch_that_keeps_ports_closed_is_refused(
    name: str, call: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRIVATE.format(name=name, call=call)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "refused: a library no longer has something" in done.stdout
    assert name.rsplit(".", 1)[1] in done.stdout


def test_a_ray_whose_node_is_not_on_loopback_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve import local_ray

    stopped = []
    monkeypatch.setattr(local_ray.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(local_ray.ray, "init", lambda **_settings: None)
    monkeypatch.setattr(local_ray.ray, "shutdown", lambda: stopped.append(True))
    monkeypatch.setattr(local_ray.ray.util, "get_node_ip_address", lambda: "192.168.1.7")
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    with pytest.raises(ServeError, match=r"192\.168\.1\.7"):
        local_ray.start_ray(1)
    assert stopped


def test_processes_append_whole_lines_that_another_follows(tmp_path: Path) -> None:
    path = tmp_path / "log"
    follower = Follower(str(path))
    logger = logging.getLogger(LOGGER)
    before = list(logger.handlers)
    append_to(str(path))
    try:
        assert list(follower.lines()) == []
        logger.error("request %s: failed", "r1")
        try:
            raise KeyError("a secret")
        except KeyError as error:
            logger.exception("request %s: %s", "r2", describe(error))
        first, second = follower.lines()
        assert first.endswith("ERROR request r1: failed")
        assert "request r2: KeyError at test_serve_process.py:" in second
        with path.open("a") as file:
            file.write("half a")
            file.flush()
            assert list(follower.lines()) == []
            file.write(" line\n")
            file.flush()
            assert list(follower.lines()) == ["half a line"]
        assert "secret" not in path.read_text()
        assert "Traceback" not in path.read_text()
    finally:
        follower.close()
        for handler in set(logger.handlers) - set(before):
            logger.removeHandler(handler)
            handler.close()
    append_to(None)
    append_to(str(tmp_path / "nowhere" / "log"))
    assert logger.handlers == before


def test_an_error_is_described_by_its_causes_and_never_by_its_words() -> None:
    try:
        try:
            raise ValueError("a secret")
        except ValueError as cause:
            raise RuntimeError("a secret") from cause
    except RuntimeError as error:
        text = describe(error)
    assert text.startswith("RuntimeError from ValueError at test_serve_process.py:")
    assert "secret" not in text
    assert describe(MemoryError("a secret")) == "MemoryError"
