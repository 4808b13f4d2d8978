"""Watch a process and all that it starts: memory and CPU seconds, five times a second.

The memory of all processes together is the sum of their PSS: of a page that several processes have
in use, each counts its share. So Ray's object store and the code of shared libraries count once.
(Pages shared with processes that are not watched count in part; there are few.) The largest single
process is measured by RSS, in which shared pages count in full.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil

SECONDS = 0.2  # between two samples


@dataclass(frozen=True, slots=True)
class Sample:
    """`at` is in epoch seconds, `largest` and `total` in bytes. `cpu` are the seconds that all
    processes have used since they started, of ended ones what was last seen."""

    at: float
    largest: int
    total: int
    cpu: float


def follow(process: subprocess.Popen[bytes], every: float = SECONDS) -> list[Sample]:
    """Sample a process and its descendants until it ends. A descendant whose parent has ended, such
    as a daemon, is still watched."""
    samples: list[Sample] = []
    known: set[psutil.Process] = set()
    cpu: dict[psutil.Process, float] = {}
    root = psutil.Process(process.pid)
    while process.poll() is None:
        started = time.monotonic()
        try:
            known |= {root, *root.children(recursive=True)}
        except psutil.NoSuchProcess:
            break
        samples.append(_sample(known, cpu))
        time.sleep(max(0.0, every - (time.monotonic() - started)))
    process.wait()
    return samples


def _sample(known: set[psutil.Process], cpu: dict[psutil.Process, float]) -> Sample:
    largest = total = 0
    at = time.time()
    for process in tuple(known):
        try:
            with process.oneshot():
                memory, times = process.memory_full_info(), process.cpu_times()
        except psutil.Error:  # it has ended
            known.discard(process)
            continue
        cpu[process] = times.user + times.system
        largest, total = max(largest, memory.rss), total + memory.pss
    return Sample(at, largest, total, sum(cpu.values()))


def cpu_between(samples: Sequence[Sample], start: float, end: float) -> float:
    """CPU seconds used between two times, interpolated between samples."""
    if not samples:
        return 0.0
    low, high = np.interp([start, end], [one.at for one in samples], [one.cpu for one in samples])
    return float(high - low)


def peaks_between(samples: Sequence[Sample], start: float, end: float) -> tuple[int, int]:
    """The peaks of `largest` and `total` between two times."""
    inside = [one for one in samples if start <= one.at <= end] or samples
    if not inside:
        return 0, 0
    return max(one.largest for one in inside), max(one.total for one in inside)
