"""A local Ray that cannot be reached from other machines.

By default Ray and Ray Serve listen on every interface, and Serve's gRPC server between deployments
unpickles whatever it receives. Two switches keep them on loopback. Both are private to Ray, so they
are kept together here, and a test checks the open ports. If a release of Ray has renamed one, the
service does not start: that is better than listening to strangers.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from ptuning.system import environment

_LOOPBACK_NODE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
environment.keep_new_ray_on_loopback()  # read at ray's import, and by processes that Ray starts

import ray  # noqa: E402
import ray._private.ray_constants as ray_constants  # noqa: E402

from ptuning.errors import ServeError  # noqa: E402
from ptuning.system.private import get_private, set_private  # noqa: E402

_STORE_BYTES = 128 << 20  # requests and tokens are small
_LOOPBACK = ("127.0.0.1", "::1")


def start_ray(num_cpus: float) -> bool:
    """Start Ray on this machine unless this process has one; returns whether it was started.

    Raises PTuningError where this Ray cannot be kept on loopback.

    Despite its name the environment variable sets the node's address to 127.0.0.1, as Ray does on
    Windows.
    """
    if ray.is_initialized():
        return False
    loopback = os.environ.get(_LOOPBACK_NODE) == "0"
    if loopback:
        # If ray was imported before this module.
        set_private(ray_constants, "ENABLE_RAY_CLUSTER", False)
    environment.silence_loggers()
    with environment.neutral_directory():
        ray.init(
            address="local",
            num_cpus=max(1, round(num_cpus)),
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    if loopback and (address := ray.util.get_node_ip_address()) not in _LOOPBACK:
        ray.shutdown()
        raise ServeError(
            "Ray's node does not stay on loopback",
            seen=address,
            expected="127.0.0.1",
            fix=f"use the release of Ray that ptuning was tested with, not {ray.__version__}",
        )
    return True


def keep_replica_on_loopback() -> None:
    """Make this Serve replica's gRPC server listen on loopback only; call before it is ready.

    Does nothing where Ray's node has another address (a cluster: its network policy decides).
    Raises PTuningError where Ray has no such function to replace.
    """
    import ray.serve._private.replica as replica

    if ray.util.get_node_ip_address() not in _LOOPBACK:
        return
    add = get_private(replica, "add_port_to_grpc_server")
    if getattr(add, "_ptuning", False):
        return

    def add_on_loopback(server: Any, address: str) -> int:
        port = address.rsplit(":", 1)[-1]
        return int(add(server, f"127.0.0.1:{port}"))

    add_on_loopback._ptuning = True  # type: ignore[attr-defined]
    set_private(replica, "add_port_to_grpc_server", add_on_loopback)
