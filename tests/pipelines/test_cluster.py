"""Joining a cluster: what does not answer is said in time, and a node that differs is refused."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import replace
from typing import Any

import pytest

from pipelines.config import RayConfig
from pipelines.gangs import cluster
from pipelines.gangs.cluster import session
from pipelines.gangs.train import Expected, check_node, package_versions
from pipelines.opening import check_places
from ptuning.errors import ConfigError, RunError
from ptuning.system.ports import free_port

HERE = Expected(package_versions(), "f" * 64, "t" * 64)


def _join(config: RayConfig) -> None:
    with session(config):
        pass


@pytest.mark.parametrize("by", ["setting", "RAY_ADDRESS"])
def test_a_cluster_that_does_not_answer_is_said_in_time(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    address = f"127.0.0.1:{free_port()}"
    config = RayConfig(connect_s=0.1, address=address if by == "setting" else None)
    if by == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with pytest.raises(RunError, match=address) as caught:
        _join(config)
    assert time.monotonic() - began < 10
    assert "ray.connect_s = 0.1" in str(caught.value)


def test_a_clusters_workers_get_our_defaults_and_the_users_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joined: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **options: joined.append(options))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
        job = {"runtime_env": {"env_vars": {"DO_NOT_TRACK": "1"}}}
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
        env = {"env_vars": {"AWS_PROFILE": "training"}, "pip": ["x"]}
        _join(RayConfig(address=address, runtime_env=env))
    (options,) = joined
    assert options["address"] == address
    assert options["runtime_env"]["pip"] == ["x"]
    variables = options["runtime_env"]["env_vars"]
    assert variables["AWS_PROFILE"] == "training"
    assert variables["TOKENIZERS_PARALLELISM"] == "false"
    assert not {"OMP_WAIT_POLICY", "DO_NOT_TRACK"} & variables.keys()


def test_a_node_that_differs_is_refused_with_both_versions() -> None:
    check_node(HERE, HERE)
    other = replace(HERE, versions={**HERE.versions, "tokenizers": "0.1"}, fingerprint="e" * 64)
    with pytest.raises(RunError) as caught:
        check_node(HERE, other)
    assert caught.value.seen == "tokenizers 0.1, backbone eeeeeeeeeeee"
    expected = f"tokenizers {HERE.versions['tokenizers']}, backbone ffffffffffff"
    assert caught.value.expected == expected


def test_a_jobs_store_and_data_have_absolute_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    check_places("store", ["rows.jsonl"])
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for store in ("/data/store", "~/store", "s3://bucket/store"):
        check_places(store, ["/rows.jsonl", "s3://bucket/rows"])
    for store, source in (("./ptuning-store", "/rows.jsonl"), ("/store", "rows.jsonl")):
        with pytest.raises(ConfigError, match="absolute paths"):
            check_places(store, [source])


@pytest.mark.parametrize("value", ["", "local", None])
def test_a_ray_of_our_own_stays_on_loopback_whatever_says_so(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    guarded: list[str] = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **options: started.append(options))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr(cluster, "set_private", lambda _, name, value: guarded.append(name))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if value is not None:
        monkeypatch.setenv("RAY_ADDRESS", value)
    _join(RayConfig())
    (options,) = started
    assert (options["address"], options["include_dashboard"]) == ("local", False)
    assert guarded == ["ENABLE_RAY_CLUSTER"]
