"""A free TCP port that stays free until it is used."""

from __future__ import annotations

import random
import socket

# Below Linux's ephemeral range (from 32768): Ray's own processes take ports there while a service
# starts, and one that had been found free was gone when it was wanted.
_RANGE = range(20_000, 30_000)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on. Raises OSError where the host cannot be bound at all."""
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
