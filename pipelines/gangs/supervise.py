"""Train a plan's packs: start gangs where there is room, look after them until all is done.

A gang that ends early is looked into (ledger.py) and started again; the others go on. Gangs pull
packs from one desk, so they may come and go: one is started wherever room appears.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray._private import state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.gangs.desk import Standing, start_desk
from pipelines.gangs.fit import GangEnd, GangHost
from pipelines.gangs.places import (
    Node,
    Place,
    Wanted,
    all_places,
    describe_nodes,
    describe_wanted,
    find_places,
)
from pipelines.plan import Pack
from pipelines.run_folder import RunFolder
from ptuning.errors import RunError
from ptuning.system.private import get_private

TICK_S = 0.5  # how often the driver looks
END_S = 10.0  # how long gangs without work may take to end
BARREN = 24  # failures without a pack done: three hunts for one user among 512
ROOM_S = 60.0  # how long a run without any gang waits for room

Progress = Callable[[int, int], None]  # users trained, tokens trained
Tell = Callable[[str], None]


def tune(
    folder: RunFolder,
    packs: Sequence[Pack],
    task: Any,
    wanted: Wanted,
    max_failures: int,
    progress: Progress,
    tell: Tell,
) -> None:
    """Train every pack that is not settled; `task` is what a worker is told
    (train.GangTask). `tell` is given a line whenever a worker died.

    Raises RunError where no gang finds room within ROOM_S, where a worker refuses its work, and
    where more than `max_failures` gangs in a row end without anything done.
    """
    desk = start_desk(folder.store.root, folder.run_id, packs)
    work = [ray.put((task, desk))]
    wanted = wanted.resolve_gpus(cluster_nodes())
    supervisor = _Supervisor(desk, work, folder, wanted, max_failures, progress, tell)
    try:
        supervisor.run()
        supervisor.wait_for_gangs()
    except ray.exceptions.RayError as error:  # of the desk: it cannot write what it decides
        raise RunError(
            "the ledger of the run failed",
            seen=f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}",
            fix="mend the cause and run the same command again; committed users are kept",
        ) from error
    finally:
        supervisor.stop()


def cluster_nodes() -> list[Node]:
    """The cluster's living nodes, with what is free on each now."""
    free = get_private(state, "available_resources_per_node")()
    return [
        Node(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


@dataclass(frozen=True)
class _Gang:
    name: str
    place: Place
    host: Any  # the GangHost's handle


class _Supervisor:
    def __init__(
        self,
        desk: Any,
        work: list[Any],
        folder: RunFolder,
        wanted: Wanted,
        max_failures: int,
        progress: Progress,
        tell: Tell,
    ) -> None:
        self._desk, self._work, self._folder = desk, work, folder
        self._wanted, self._max_failures = wanted, max_failures
        self._progress, self._tell = progress, tell
        self._gangs: dict[Any, _Gang] = {}  # by the reference of its end
        self._started = 0
        self._fruitless = 0  # failures in a row that told nothing of any pack
        self._barren = 0  # failures in a row without any pack done
        self._last: Standing | None = None  # when a gang last ended, or the run began
        self._no_room_since: float | None = None

    def run(self) -> None:
        while True:
            standing = self._look()
            self._last = self._last or standing
            if not standing.left:
                return  # gangs that are still here have nothing to do, and end
            self._start_gangs(standing)
            done, _ = ray.wait([*self._gangs], timeout=TICK_S) if self._gangs else ([], [])
            for end in done:
                self._finish(end)
            if not self._gangs:
                self._check_room()

    def wait_for_gangs(self) -> None:
        """Let the gangs end of their own accord, now that no pack is left."""
        if self._gangs:
            ray.wait([*self._gangs], num_returns=len(self._gangs), timeout=END_S)

    def stop(self) -> None:
        """Leave nothing behind."""
        for gang in self._gangs.values():
            ray.kill(gang.host)
        ray.kill(self._desk)

    def _look(self) -> Standing:
        standing: Standing = ray.get(self._desk.read.remote())
        self._progress(standing.users, standing.tokens)
        for line in standing.told:
            self._tell(line)
        return standing

    def _start_gangs(self, standing: Standing) -> None:
        """One on each node with room, while there are packs that nobody holds."""
        wanted = self._still_wanted(standing.open)
        if wanted is None:
            return
        busy = {gang.place.node_id for gang in self._gangs.values()}
        nodes = [node for node in cluster_nodes() if node.node_id not in busy]
        for place in find_places(nodes, wanted):
            self._start(place)

    def _still_wanted(self, packs: int) -> Wanted | None:
        at_work = sum(gang.place.workers for gang in self._gangs.values())
        if self._wanted.sharded:
            return None if self._gangs or not packs else self._wanted
        most = packs if self._wanted.workers is None else min(packs, self._wanted.workers - at_work)
        return self._wanted.limited_to(most) if most > 0 else None

    def _start(self, place: Place) -> None:
        gang = f"{self._folder.run_id}-gang-{self._started}"
        self._started += 1
        self._no_room_since = None
        host_of = ray.remote(num_cpus=0)(GangHost)
        if place.node_id is not None:
            here = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
            host_of = host_of.options(scheduling_strategy=here)
        host: Any = host_of.remote()
        end = host.fit.remote(self._work, gang, place, self._folder.scratch)
        self._gangs[end] = _Gang(gang, place, host)
        if self._wanted.sharded:  # a smaller one may not hold the model
            self._wanted = replace(self._wanted, workers=place.workers, cpus=place.cpus)

    def _finish(self, reference: Any) -> None:
        gang = self._gangs.pop(reference)
        try:
            end: GangEnd = ray.get(reference)
        except ray.exceptions.RayError as error:  # its node is gone, and the task with it
            end = GangEnd(error=f"{type(error).__name__}: the gang's node or process is gone")
        ray.kill(gang.host)
        if end.refused is not None:
            raise RunError("a training worker refused its work", seen=end.refused)
        if end.unplaced:
            raise no_room(cluster_nodes(), self._wanted, waited_s=ROOM_S)
        learned = ray.get(
            self._desk.end.remote(gang.name, gang.place.workers, end.blamed, end.blameless)
        )
        if end.error is not None:
            self._tell(f"training workers ended early: {end.error}")
        standing = self._look()
        if end.error is not None:
            self._count(end.error, learned, standing)
        self._last = standing

    def _count(self, error: str, learned: int, standing: Standing) -> None:
        """Give up where failures teach nothing, or nothing is done between ever so many of them:
        then it is not one user's rows."""
        before = self._last or standing
        done = standing.done > before.done
        self._fruitless = 0 if learned or standing.left < before.left else self._fruitless + 1
        self._barren = 0 if done else self._barren + 1
        if self._fruitless > self._max_failures or self._barren > BARREN:
            raise RunError(
                "the training gang failed",
                seen=error,
                fix="mend the cause and run the same command again; committed users are kept",
            )

    def _check_room(self) -> None:
        """No gang is at work, though there are packs: nodes may be taken, or not be there yet."""
        now = time.monotonic()
        if self._no_room_since is None:
            self._no_room_since = now
        if now - self._no_room_since < ROOM_S:
            time.sleep(TICK_S)
            return
        raise no_room(cluster_nodes(), self._wanted, waited_s=ROOM_S)


def check_room(nodes: Sequence[Node], wanted: Wanted) -> None:
    """Raise RunError where no gang would fit if the cluster were free."""
    wanted = wanted.resolve_gpus(nodes)
    if not all_places(nodes, wanted):
        raise no_room(nodes, wanted, waited_s=0)


def no_room(nodes: Sequence[Node], wanted: Wanted, *, waited_s: float) -> RunError:
    waited = f" after {waited_s:g} s" if waited_s else ""
    return RunError(
        f"no node has room for a training worker{waited}",
        seen=describe_nodes(nodes),
        expected=describe_wanted(wanted),
        fix="lower ray.workers, ray.cpus_per_worker or ray.gpus_per_worker, free a node or add one",
    )
