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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.gangs.cluster import cluster_nodes
from pipelines.gangs.desk import Standing, start_desk
from pipelines.gangs.fit import GangEnd, GangHost
from pipelines.gangs.places import Place, Wanted, find_places, no_room
from pipelines.plan import Pack
from pipelines.run_folder import RunFolder
from ptuning.errors import RunError

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
    on_commit: Callable[[str], None],
) -> None:
    """Train every pack that is not settled. `task` is the workers' task (train.GangTask); `tell` is
    called with a line whenever a worker died, `on_commit` with the id of each pack that now has a
    done-record.

    Raises RunError if no gang finds room within ROOM_S, if a worker refuses its work, and if gangs
    keep failing (Patience).
    """
    desk = start_desk(folder.store.root, folder.run_id, packs)
    work = [ray.put((task, desk))]
    wanted = wanted.resolve_gpus(cluster_nodes())
    supervisor = _Supervisor(desk, work, folder, wanted, max_failures, progress, tell, on_commit)
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


@dataclass(frozen=True)
class _Gang:
    name: str
    place: Place
    host: Any  # the GangHost's handle


@dataclass
class Patience:
    """When to give up: more than `max_failures` failures in a row that taught nothing about any
    pack, or BARREN in a row without a pack done. Then it is not one user's rows."""

    max_failures: int
    _fruitless: int = 0
    _barren: int = 0
    _done: int = 0  # packs, at the last failure

    def is_lost(self, learned: int, standing: Standing) -> bool:
        """Whether a gang's failure was one too many. `learned`: of how many packs it told
        something; `standing`: after it."""
        done, self._done = standing.done - self._done, standing.done
        self._fruitless = 0 if learned or done else self._fruitless + 1
        self._barren = 0 if done else self._barren + 1
        return self._fruitless > self.max_failures or self._barren > BARREN


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
        on_commit: Callable[[str], None],
    ) -> None:
        self._on_commit = on_commit
        self._desk, self._work, self._folder = desk, work, folder
        self._wanted, self._patience = wanted, Patience(max_failures)
        self._progress, self._tell = progress, tell
        self._gangs: dict[Any, _Gang] = {}  # by the reference of its end
        self._started = 0
        self._no_room_since: float | None = None

    def run(self) -> None:
        while True:
            standing = self._look()
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
        for pack_id in standing.committed:
            self._on_commit(pack_id)
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
        if end.error is not None and self._patience.is_lost(learned, standing):
            raise RunError(
                "the training gang failed",
                seen=end.error,
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
