"""Ray for a run: join the cluster that was named, or start a small one on this machine.

Also what is decided once per run for all workers: dtype and attention, and how many workers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

# No usage reports, and no reuse of this process's import state by Ray's own logging.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from pipelines.config import RayConfig, RunConfig
from ptuning.data.encode import Template
from ptuning.errors import RunError
from ptuning.load import (
    choose_attention,
    choose_device,
    choose_dtype,
    fingerprint_of,
    load_tokenizer,
    locate,
)


@contextlib.contextmanager
def session(config: RayConfig) -> Iterator[tuple[dict[str, float], float]]:
    """Ray, initialised: (the cluster's resources, seconds it took). Left as it was found."""
    begin = time.monotonic()
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(
                address=config.address,
                include_dashboard=False if config.address is None else None,
                log_to_driver=False,
                logging_level=logging.WARNING,
                configure_logging=False,
            )
        except (ConnectionError, RuntimeError) as error:
            raise RunError(
                "Ray cannot be reached or started",
                seen=str(error),
                fix="check ray.address, or leave it out to start Ray on this machine",
            ) from error
    try:
        yield ray.cluster_resources(), time.monotonic() - begin
    finally:
        if ours:
            ray.shutdown()


def workers(config: RayConfig) -> int:
    """Training processes of the gang."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    return config.workers or max(1, gpus)


def threads(config: RayConfig, packs: int, sharding: str) -> int:
    """Compute threads of each worker: its share of a host's CPUs."""
    count = workers(config)
    if sharding == "replicate":
        count = max(1, min(count, packs))
    hosts = max(1, len([node for node in ray.nodes() if node["Alive"]]))
    cpus = config.cpus_per_worker or ray.cluster_resources().get("CPU", 1.0) / count
    return max(1, int(min(cpus, (os.cpu_count() or 1) * hosts)))


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with dtype and attention decided for every host of the cluster.

    bfloat16 only where each host measures it as faster: one slow host would hold up the
    gang, and users' prefixes must not depend on which host trained them.
    """
    chosen = config.backbone
    device = choose_device(chosen.device)
    kind = choose_attention(chosen.attention, device)
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


def backbone_identity(config: RunConfig) -> dict[str, Any]:
    """Name, fingerprint and template digest of the backbone, without loading its weights."""
    source = locate(config.backbone.name)
    template = Template.of(load_tokenizer(config.backbone.name), config.data.template)
    return {
        "backbone_name": source.name,
        "fingerprint": fingerprint_of(source),
        "template_digest": template.digest,
    }
