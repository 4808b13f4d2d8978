"""Rendezvous of the workers of a sharded gang.

torch's default rendezvous, a TCP store, listens on every interface without authentication, and the
address cannot be chosen. So workers on one host meet through a file, and gloo uses the loopback
interface: nothing listens beyond it. Workers on several hosts have no common file; there rank 0
opens a TCP store on its node's address, which the cluster's network must protect.
"""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta
from pathlib import Path

import ray.train
import ray.util
import torch.distributed as dist
from ray.train.collective import broadcast_from_rank_zero

from ptuning.system.ports import free_port


def join_peers(backend: str, timeout_s: float) -> None:
    """Create a gang's process group; every worker calls it. `backend` is gloo or nccl; `timeout_s`
    is how long to wait for a silent peer."""
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    # Libraries that expect a launcher read these; the address is not used.
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    one_host = context.get_local_world_size() == size
    if one_host:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    place = broadcast_from_rank_zero(_meeting_place(one_host) if rank == 0 else None)
    dist.init_process_group(
        backend,
        init_method=place,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )


def _meeting_place(one_host: bool) -> str:
    """A new rendezvous for every start of the gang, since remains of an earlier one would
    mislead."""
    if one_host:
        return (Path(tempfile.mkdtemp(prefix="ptuning-gang-")) / "peers").as_uri()
    address = ray.util.get_node_ip_address()
    return f"tcp://{address}:{free_port(address)}"


def leave_peers() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
