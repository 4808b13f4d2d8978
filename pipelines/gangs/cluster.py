"""Ray for a run: join the cluster that was named, or start a small one on this machine.

Also what is decided once per run for all workers: dtype and attention, and how many workers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import ray
import ray._private.ray_constants as ray_constants

from pipelines.config import RayConfig, RunConfig
from ptuning.errors import ConfigError, RunError
from ptuning.model.devices import choose_attention, choose_device, choose_dtype, free_memory
from ptuning.model.fingerprint import fingerprint_of
from ptuning.model.load import load_template, model_class, read_config, weight_bytes
from ptuning.model.locate import locate
from ptuning.system import environment
from ptuning.system.private import set_private

_WORKER_BYTES = 4 << 30  # a worker's interpreter, libraries and activations, measured


@contextlib.contextmanager
def session(config: RayConfig) -> Iterator[float]:
    """Ray, initialised, for the block; the value is the seconds it took. Left as it was found."""
    begin = time.monotonic()
    ours = not ray.is_initialized()
    if ours and config.address is None:
        # A Ray of our own is for this machine alone: it listens on loopback only. The name
        # speaks of Windows; what it does is to make the node's address 127.0.0.1.
        environment.keep_new_ray_on_loopback()
        set_private(ray_constants, "ENABLE_RAY_CLUSTER", False)
    if ours:
        try:
            environment.silence_loggers()
            with environment.neutral_directory():
                ray.init(
                    address=config.address or "local",
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
        yield time.monotonic() - begin
    finally:
        if ours:
            ray.shutdown()


@dataclass(frozen=True)
class Gang:
    """The shape of the training gang; `cpus` and `gpus` are of each worker."""

    workers: int
    cpus: float
    gpus: float
    threads: int


def gang(config: RunConfig) -> Gang:
    """One worker per GPU, else per CPU core while weights and work fit into memory.

    On CPUs many one-thread workers beat few many-thread ones: small operations do not
    wait for each other's threads (infra/decisions.md). A large model gets fewer workers with
    more threads.
    """
    resources = ray.cluster_resources()
    chosen, cores = config.ray, resources.get("CPU", 1.0)
    gpus = chosen.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if resources.get("GPU", 0) else 0.0
    count = chosen.workers
    if count is None:
        count = (
            int(resources.get("GPU", 0) // gpus) if gpus else _workers_in_memory(config, int(cores))
        )
    # Ray counts in ten-thousandths; rounding up would ask for more than there is.
    share = math.floor(1e4 * cores / max(1, count)) / 1e4
    cpus = chosen.cpus_per_worker or (1.0 if gpus else share)
    count = max(1, count)
    for name, wanted in (("CPU", count * cpus), ("GPU", count * gpus)):
        # Ray would wait for such workers for ever.
        if wanted > resources.get(name, 0.0):
            raise ConfigError(
                f"the gang does not fit into the cluster's {name}s",
                seen=f"{count} workers need {wanted:g}",
                expected=f"at most {resources.get(name, 0.0):g}",
                fix="lower ray.workers, ray.cpus_per_worker or ray.gpus_per_worker",
            )
    return Gang(count, cpus, gpus, max(1, int(cpus)))


def _workers_in_memory(config: RunConfig, cores: int) -> int:
    """How many whole backbones this machine can hold beside each other, at most one a core."""
    free = free_memory(choose_device("cpu"))
    if free is None or config.backbone.sharding == "zero3":
        return max(1, cores)
    dtype = choose_dtype(config.backbone.dtype, choose_device("cpu"))
    source = locate(config.backbone.name)
    each = weight_bytes(source, read_config(source), dtype) + _WORKER_BYTES
    return max(1, min(cores, int(free // 2 // each)))


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with dtype and attention decided for every host of the cluster.

    bfloat16 only where each host measures it as faster: one slow host would hold up the
    gang, and users' prefixes must not depend on which host trained them.
    """
    chosen = config.backbone
    device = choose_device(chosen.device)
    built_as = model_class(read_config(locate(chosen.name)))
    kind = choose_attention(chosen.attention, device, built_as)
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
    """Which backbone a run trains on, as prefixes name it."""

    backbone_name: str
    fingerprint: str
    template_digest: str


def identify_backbone(config: RunConfig) -> NamedBackbone:
    """The backbone's name, fingerprint and template digest, without loading its weights."""
    source = locate(config.backbone.name)
    template = load_template(config.backbone.name, config.data.template)
    return NamedBackbone(
        backbone_name=source.name,
        fingerprint=fingerprint_of(source, read_config(source)),
        template_digest=template.digest,
    )
