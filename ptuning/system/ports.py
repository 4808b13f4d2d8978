"""Find a free TCP port that is likely to stay free until it is used."""

from __future__ import annotations

import random
import socket

# Below Linux's ephemeral range (from 32768), from which Ray's processes take ports while a service
# starts: a port found free there may be taken a moment later.
_RANGE = range(20_000, 30_000)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on. Raises OSError if no port of the host can be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    error: OSError | None = None
    for port in random.sample(_RANGE, 50):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((host, port))
            except OSError as taken:
                error = taken
                continue
            return port
    assert error is not None
    raise error
