"""Ray for a run: connect to the configured cluster, or start a local one on this machine.

Also resolves, once per run for all workers, the dtype, the attention and the number of workers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray._private.ray_constants as ray_constants
from ray._private import state

from pipelines.config import RayConfig, RunConfig
from pipelines.gangs.places import Node, Wanted
from ptuning.errors import RunError
from ptuning.model.devices import choose_attention, choose_device, choose_dtype
from ptuning.model.fingerprint import fingerprint_of
from ptuning.model.load import load_template, model_class, read_config, weight_bytes
from ptuning.model.locate import locate_model
from ptuning.system import environment
from ptuning.system.private import get_private, set_private

_WORKER_BYTES = 4 << 30  # a worker's interpreter, libraries and activations, measured


@contextlib.contextmanager
def session(config: RayConfig) -> Iterator[float]:
    """Initialise Ray for the block; gives the seconds that this took. If Ray was already
    initialised, it is left running. Raises RunError if the cluster does not answer in time."""
    begin = time.monotonic()
    ours = not ray.is_initialized()
    if ours:
        address = config.address or os.environ.get("RAY_ADDRESS") or "local"
        if address == "local":
            # A local Ray is only for this machine, so it must listen on loopback only. Without
            # clusters, Ray sets the node's address to 127.0.0.1, as on Windows.
            environment.keep_new_ray_on_loopback()
            set_private(ray_constants, "ENABLE_RAY_CLUSTER", False)
        else:
            _wait_for(address, config.connect_s)
        try:
            environment.silence_loggers()
            with environment.neutral_directory():
                ray.init(
                    address=address,
                    include_dashboard=False if address == "local" else None,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    configure_logging=False,
                    runtime_env=config.runtime_env if address == "local" else _runtime_env(config),
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunError(
                "Ray cannot be reached or started",
                seen=str(error),
                fix="check ray.address and RAY_ADDRESS, or omit both to start Ray on this machine",
            ) from error
    try:
        yield time.monotonic() - begin
    finally:
        if ours:
            ray.shutdown()


def _runtime_env(config: RayConfig) -> dict[str, Any]:
    """The runtime environment of a run on a cluster. Its workers do not inherit the driver's
    variables, so they get our defaults, unless the user or the job has set them."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    given = ((job.get("runtime_env") or {}).get("env_vars") or {}).keys()
    chosen = dict(config.runtime_env or {})
    defaults = {
        name: value
        for name, value in environment.DEFAULTS.items()
        if os.environ.get(name) == value and name not in given
    }
    return chosen | {"env_vars": defaults | chosen.get("env_vars", {})}


def _wait_for(address: str, seconds: float) -> None:
    """Wait until something listens at `host:port`: Ray itself waits for minutes, with a warning of
    its own every few seconds. Other forms of address (auto, local) are left to Ray."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdigit()):
        return
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RunError(
                    "the Ray cluster does not answer",
                    seen=f"{address}: {error}",
                    expected=f"a connection within ray.connect_s = {seconds:g} s",
                    fix="check ray.address or RAY_ADDRESS, and that the cluster's head is up",
                ) from error
        time.sleep(1.0)


def cluster_nodes() -> list[Node]:
    """The cluster's living nodes, with what is free on each now."""
    free = get_private(state, "available_resources_per_node")()
    return [
        Node(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def wanted_workers(config: RunConfig) -> Wanted:
    """What the configuration asks of the cluster: by default one worker per GPU, or without GPUs
    one per CPU core as far as weights and activations fit into the node's memory.

    On CPUs many single-threaded workers are faster than few multi-threaded ones, since small
    operations need not synchronise threads (infra/decisions.md). A large model gets fewer workers
    with more threads.
    """
    chosen, sharded = config.ray, config.backbone.sharding == "zero3"
    return Wanted(
        workers=chosen.workers,
        cpus=chosen.cpus_per_worker,
        gpus=chosen.gpus_per_worker,
        worker_bytes=0.0 if sharded else _worker_bytes(config),
        sharded=sharded,
    )


def _worker_bytes(config: RunConfig) -> float:
    """Memory to allow for a worker on a CPU: twice what it was measured to need."""
    dtype = choose_dtype(config.backbone.dtype, choose_device("cpu"))
    source = locate_model(config.backbone.name)
    return 2.0 * (weight_bytes(source, read_config(source), dtype) + _WORKER_BYTES)


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with dtype and attention resolved, the same for every host of the cluster.

    bfloat16 is used only if it is faster on every host: one slow host would hold up the gang, and a
    user's prefix must not depend on the host that trained it.
    """
    chosen = config.backbone
    device = choose_device(chosen.device)
    chosen_class = model_class(read_config(locate_model(chosen.name)))
    kind = choose_attention(chosen.attention, device, chosen_class)
    dtype = chosen.dtype
    if dtype == "auto":
        votes = _probe_hosts(str(device))
        dtype = "bfloat16" if all(vote == "bfloat16" for vote in votes) else "float32"
    backbone = chosen.model_copy(update={"dtype": dtype, "attention": kind})
    return config.model_copy(update={"backbone": backbone})


def _probe_hosts(device: str) -> list[str]:
    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) <= 1:
        return [_fastest(device)]
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0.5)(_fastest)
    return ray.get(
        [
            remote.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(device)
            for node in alive
            if node["Resources"].get("CPU", 0) >= 0.5
        ]
    )


def _fastest(device: str) -> str:
    return str(choose_dtype("auto", choose_device(device))).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True)
class NamedBackbone:
    """A run's backbone, as identified in prefixes."""

    backbone_name: str
    fingerprint: str
    template_digest: str


def identify_backbone(config: RunConfig) -> NamedBackbone:
    """The backbone's name, fingerprint and template digest, without loading its weights."""
    source = locate_model(config.backbone.name)
    template = load_template(config.backbone.name, config.data.template)
    return NamedBackbone(
        backbone_name=source.name,
        fingerprint=fingerprint_of(source, read_config(source)),
        template_digest=template.digest,
    )
