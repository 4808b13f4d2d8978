"""Where gangs can be: on which nodes, with how many workers of which size. Pure functions."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ptuning.errors import RunError


@dataclass(frozen=True, kw_only=True)
class Node:
    """A host of the cluster; `total` and `free` are of Ray's resources (CPU, GPU, memory)."""

    node_id: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the configuration asks for; None: as many, or as large, as suits the node.

    `worker_bytes` is the memory of one worker on a CPU; `most` bounds the workers. A `sharded`
    gang holds one backbone between all its workers, on as many nodes as that takes.
    """

    workers: int | None = None
    cpus: float | None = None
    gpus: float | None = None
    worker_bytes: float = 0.0
    sharded: bool = False
    most: int | None = None

    def limited_to(self, workers: int) -> Wanted:
        """The same, but `workers` at the most."""
        return replace(self, most=workers)

    def resolve_gpus(self, nodes: Sequence[Node]) -> Wanted:
        """The same with `gpus` decided: one per worker if any node of the cluster has GPUs. Decided
        once for all gangs: workers on CPUs beside others on GPUs would train otherwise."""
        if self.gpus is not None:
            return self
        return replace(self, gpus=float(any(node.total.get("GPU", 0) for node in nodes)))


@dataclass(frozen=True, kw_only=True)
class Place:
    """A gang's node (None: any) and its workers, with the CPUs and GPUs of each."""

    node_id: str | None
    workers: int
    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        """Compute threads of a worker."""
        return max(1, int(self.cpus))


def all_places(nodes: Sequence[Node], wanted: Wanted) -> list[Place]:
    """The gangs that the cluster can hold, whatever runs on it now; [] where none fits."""
    return find_places([replace(node, free=node.total) for node in nodes], wanted)


def find_places(nodes: Sequence[Node], wanted: Wanted) -> list[Place]:
    """The gangs that fit into what is free now, largest nodes first."""
    gpus = wanted.resolve_gpus(nodes).gpus or 0.0
    counts = _counts(nodes, wanted, gpus)
    places = [
        Place(
            node_id=node.node_id,
            workers=count,
            cpus=wanted.cpus or (1.0 if gpus else _share(node, count)),
            gpus=gpus,
        )
        for node, count in counts
        if count
    ]
    if not wanted.sharded:
        return places
    workers = sum(place.workers for place in places)
    if workers < (wanted.workers or 1):
        return []  # all workers together, or none
    cpus = min(place.cpus for place in places)
    return [Place(node_id=None, workers=workers, cpus=cpus, gpus=gpus)]


def _counts(nodes: Sequence[Node], wanted: Wanted, gpus: float) -> list[tuple[Node, int]]:
    """Workers of each node, largest nodes first; fewer than there is room for are spread."""
    rooms = sorted(
        ((_room(node, wanted, gpus), node) for node in nodes),
        key=lambda found: (-found[0], found[1].node_id),
    )
    left = sum(n for n, _ in rooms) if wanted.workers is None else wanted.workers
    left = left if wanted.most is None else min(left, wanted.most)
    counts = [0] * len(rooms)
    spare = [(-room, n) for n, (room, _) in enumerate(rooms)]  # a heap
    while left and spare and spare[0][0] < 0:
        room, n = spare[0]
        counts[n], left = counts[n] + 1, left - 1
        heapq.heapreplace(spare, (room + 1, n))
    # More workers than cores, as was asked for: they share the cores of the nodes that have any.
    shared = [n for n, (_, node) in enumerate(rooms) if node.free.get("CPU", 0) > 0]
    whole = sum(_room(replace(node, free=node.total), wanted, gpus) for node in nodes)
    if wanted.cpus is None and not gpus and shared and left and (wanted.workers or 0) > whole:
        for n in range(left):
            counts[shared[n % len(shared)]] += 1
    return [(node, count) for (_, node), count in zip(rooms, counts, strict=True)]


def _room(node: Node, wanted: Wanted, gpus: float) -> int:
    """How many workers the node has room for, by cores, GPUs and, unless a number was asked for,
    by memory."""
    cores = node.free.get("CPU", 0.0)
    limits = [cores / (wanted.cpus or 1.0)]
    if gpus:
        limits.append(node.free.get("GPU", 0.0) / gpus)
    elif wanted.workers is None and wanted.worker_bytes and "memory" in node.free:
        # One worker is tried where there is little memory: what is counted is an estimate.
        limits.append(max(1.0, node.free["memory"] / wanted.worker_bytes))
    return int(min(limits) + 1e-6)


def _share(node: Node, count: int) -> float:
    """CPUs of each of `count` workers. Ray counts in ten-thousandths; rounding up would ask for
    more than there is."""
    return math.floor(1e4 * node.free["CPU"] / count) / 1e4


def describe_nodes(nodes: Sequence[Node]) -> str:
    """One phrase per node: what is free of what there is."""
    names = [name for name in ("CPU", "GPU") if any(node.total.get(name) for node in nodes)]
    return "; ".join(
        f"{node.address}: "
        + ", ".join(
            f"{node.free.get(name, 0):g} of {node.total.get(name, 0):g} {name}s free"
            for name in names
        )
        for node in nodes
    )


def _count(number: float, name: str) -> str:
    return f"{number:g} {name}{'s' * (number != 1)}"


def describe_wanted(wanted: Wanted) -> str:
    """What one worker needs, in words."""
    each = _count(wanted.cpus or 1, "CPU")
    each += f" and {_count(wanted.gpus, 'GPU')}" if wanted.gpus else ""
    count = "at least one worker"
    if wanted.workers is not None:
        count = f"{wanted.workers} worker{'s' * (wanted.workers > 1)}"
    return f"{count} of {each}" + (", all of one gang together" if wanted.sharded else "")


def check_room(nodes: Sequence[Node], wanted: Wanted) -> None:
    """Raise RunError where no gang would fit if the cluster were free."""
    wanted = wanted.resolve_gpus(nodes)
    if not all_places(nodes, wanted):
        raise no_room(nodes, wanted, waited_s=0)


def no_room(nodes: Sequence[Node], wanted: Wanted, *, waited_s: float) -> RunError:
    """The error that says what one worker needs, and what is free on which node."""
    waited = f" after {waited_s:g} s" if waited_s else ""
    return RunError(
        f"no node has room for a training worker{waited}",
        seen=describe_nodes(nodes),
        expected=describe_wanted(wanted),
        fix="lower ray.workers, ray.cpus_per_worker or ray.gpus_per_worker, free a node or add one",
    )
