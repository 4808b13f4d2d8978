"""A Ray of one machine that nobody else can reach.

By default Ray and Ray Serve listen on every interface, one of them (Serve's gRPC server
between deployments) unpickling whatever it is sent. Two switches keep them on loopback; both
are Ray's private business, so they are here, together, and a test looks at the open ports. A
Ray that has renamed one is refused: better no service than one that listens to strangers.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from ptuning.system import environment

_LOOPBACK_NODE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
environment.keep_new_ray_on_loopback()  # read when ray is imported, and by what Ray starts

import ray  # noqa: E402
import ray._private.ray_constants as ray_constants  # noqa: E402

from ptuning.errors import ServeError  # noqa: E402
from ptuning.system.private import private, set_private  # noqa: E402

_STORE_BYTES = 128 << 20  # requests and tokens are small
_LOOPBACK = ("127.0.0.1", "::1")


def start_ray(num_cpus: float) -> bool:
    """Start Ray on this machine unless this process has one; True where it was started.

    Raises PTuningError where this Ray cannot be kept on loopback.

    The name of the environment variable speaks of Windows; what it does is to make the node's
    address 127.0.0.1, as Ray does there.
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
            "Ray's node does not keep to loopback",
            seen=address,
            expected="127.0.0.1",
            fix=f"use the release of Ray that ptuning was tested with, not {ray.__version__}",
        )
    return True


def keep_replica_on_loopback() -> None:
    """In a Serve replica, before it is ready: its gRPC server listens on loopback only.

    Does nothing where Ray's node has another address (a cluster: its network policy decides).
    Raises PTuningError where Ray has no such function to replace.
    """
    import ray.serve._private.replica as replica

    if ray.util.get_node_ip_address() not in _LOOPBACK:
        return
    add = private(replica, "add_port_to_grpc_server")
    if getattr(add, "_ptuning", False):
        return

    def add_on_loopback(server: Any, address: str) -> int:
        port = address.rsplit(":", 1)[-1]
        return int(add(server, f"127.0.0.1:{port}"))

    add_on_loopback._ptuning = True  # type: ignore[attr-defined]
    set_private(replica, "add_port_to_grpc_server", add_on_loopback)
