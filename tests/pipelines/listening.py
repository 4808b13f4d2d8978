"""On which addresses the processes of a run listen."""

from __future__ import annotations

import contextlib
import ipaddress
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import psutil

MARK = "TEST_RUN_MARK"  # in the environment of every process of the run


@dataclass(frozen=True)
class Listeners:
    """(address, port) of every socket that was seen, with its process's name. Processes that are
    started with `environment` are watched."""

    environment: dict[str, str]
    found: dict[tuple[str, int], str] = field(default_factory=dict)

    def check_loopback(self) -> None:
        assert len(self.found) > 3, "the processes of the run were not seen"
        beyond = {
            place: name
            for place, name in self.found.items()
            if not ipaddress.ip_address(place[0]).is_loopback
        }
        assert beyond == {}


def listening(mark: str) -> dict[tuple[str, int], str]:
    """(address, port) on which processes with the mark listen now, with the process's name."""
    found = {}
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status != psutil.CONN_LISTEN or connection.pid is None:
            continue
        try:
            process = psutil.Process(connection.pid)
            if process.environ().get(MARK) == mark:
                found[connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port] = (
                    process.name()
                )
        except psutil.Error:
            continue  # it ended meanwhile
    return found


@contextlib.contextmanager
def watch_listeners() -> Iterator[Listeners]:
    """Look for listeners until the block ends."""
    mark, ended = uuid.uuid4().hex, threading.Event()
    listeners = Listeners({MARK: mark})

    def look() -> None:
        while not ended.wait(0.25):  # looking costs CPU that the run needs
            listeners.found.update(listening(mark))

    with ThreadPoolExecutor(1) as pool:
        watcher = pool.submit(look)
        try:
            yield listeners
        finally:
            ended.set()
        watcher.result()
