"""A gang's worker: load the backbone once, then train packs from the desk until none is left."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import ray
import ray.train
import torch

from pipelines.candidates.judge import gate_all
from pipelines.done_record import DoneRecord
from pipelines.gangs.desk import PackPost
from pipelines.gangs.meeting import join_peers, leave_peers
from pipelines.gangs.places import Place
from pipelines.gangs.worker import PackJob, pack_machine
from pipelines.plan import Pack
from pipelines.run_folder import RunFolder
from ptuning.data.encode import TemplateKind
from ptuning.errors import RunError
from ptuning.gate import GateConfig
from ptuning.identity import Recipe
from ptuning.model.backbone import Backbone
from ptuning.model.devices import choose_device
from ptuning.model.facts import BackboneConfig
from ptuning.model.load import load_backbone
from ptuning.store import Store
from ptuning.train.step import Driver, LocalDriver, Machine, Result, Train

REPORT_S = 0.5  # how often a worker reports its tokens
WAIT_S = 1.0  # how often a worker asks again that has to wait


@dataclass(frozen=True)
class Expected:
    """What a worker must find on its node: the driver's package versions, backbone and template."""

    versions: Mapping[str, str]
    fingerprint: str
    template_digest: str


def package_versions() -> dict[str, str]:
    """The versions here of the packages that a training depends on; torch without its build."""
    names = ("ptuning", "torch", "transformers", "tokenizers")
    return {name: version(name).partition("+")[0] for name in names}


def check_node(expected: Expected, found: Expected) -> None:
    """Raise RunError if a node's packages, model or tokenizer differ from the driver's."""
    pairs = [(name, found.versions.get(name), want) for name, want in expected.versions.items()]
    pairs += [
        ("backbone", found.fingerprint[:12], expected.fingerprint[:12]),
        ("template", found.template_digest[:12], expected.template_digest[:12]),
    ]
    wrong = [(name, seen, want) for name, seen, want in pairs if seen != want]
    if wrong:
        raise RunError(
            f"node {socket.gethostname()} differs from the driver",
            seen=", ".join(f"{name} {seen}" for name, seen, _ in wrong),
            expected=", ".join(f"{name} {want}" for name, _, want in wrong),
            fix="install the same packages and put the same model on every node",
        )


@dataclass(frozen=True)
class GangTask:
    """A worker's task. Plain values only, since it is sent to other hosts."""

    store: str
    run_id: str
    recipe: Recipe
    gate: GateConfig
    backbone: BackboneConfig  # dtype and attention resolved
    template: TemplateKind
    expected: Expected
    timeout_s: float  # how long a silent peer of a sharded gang is waited for

    @property
    def is_sharded(self) -> bool:
        return self.backbone.sharding == "zero3"


def run_worker(task: GangTask, desk: Any, gang: str, place: Place) -> None:
    """Train packs until the desk has no more. Raises what must end the gang."""
    torch.set_num_threads(place.threads)
    holder = f"{gang}/{ray.train.get_context().get_world_rank()}"
    first = None
    if task.is_sharded:
        join_peers("nccl" if place.gpus else "gloo", task.timeout_s)
    elif (first := _take(desk, holder, task)) is None:
        return  # before the backbone is loaded for nothing
    try:
        backbone, driver = _load(task)
        found = Expected(package_versions(), backbone.fingerprint, backbone.template.digest)
        check_node(task.expected, found)
        folder = RunFolder(Store(task.store), task.run_id)
        job = PackJob(folder.store, folder.rows, task.recipe)
        packs = _train_packs(backbone, job, task, desk, holder, first)
        driver.run(_count_tokens(packs, desk))
    finally:
        leave_peers()


def _load(task: GangTask) -> tuple[Backbone, Driver]:
    chosen = task.backbone
    if chosen.device == "auto":  # Ray shows a worker only its own GPUs
        device = str(choose_device("auto"))
        chosen = chosen.model_copy(update={"device": device})
    if task.is_sharded:
        from ptuning.train.zero import LockstepDriver, load_sharded

        backbone = load_sharded(chosen, template=task.template)
        return backbone, LockstepDriver(backbone, task.recipe.method)
    backbone = load_backbone(chosen, template=task.template)
    return backbone, LocalDriver(backbone)


def _take(desk: Any, holder: str, task: GangTask) -> Pack | None:
    """The next pack; None if there is none for this worker."""
    while (answer := ray.get(desk.take.remote(holder))) == "wait":
        if task.is_sharded:  # its peers need it beside them: it goes on without a pack
            return None
        time.sleep(WAIT_S)
    pack: Pack | None = answer
    return pack


def _train_packs(
    backbone: Backbone, job: PackJob, task: GangTask, desk: Any, holder: str, first: Pack | None
) -> Machine[None]:
    """A worker's whole work as one machine: idle peers of a sharded gang wait inside it."""
    before = backbone.checksum()
    pack = first or _take(desk, holder, task)
    while pack is not None:
        # What it raises ends the process: after an error nobody knows what still works in it.
        yield from _train_pack(backbone, job, task, desk, holder, pack, before)
        pack = _take(desk, holder, task)


def _train_pack(
    backbone: Backbone,
    job: PackJob,
    task: GangTask,
    desk: Any,
    holder: str,
    pack: Pack,
    checksum: str,
) -> Machine[None]:
    start = trained = time.monotonic()
    post = PackPost(desk, pack.pack_id)

    def on_trained(user_key: str) -> None:
        nonlocal trained
        trained = time.monotonic()
        post.add_user(user_key)

    reports = yield from pack_machine(backbone, job, pack, on_trained)
    backbone.verify_unchanged(checksum)
    gate_all(reports, task.gate)
    end = time.monotonic()
    record = DoneRecord(
        pack_id=pack.pack_id,
        attempt=f"{holder}-{os.getpid()}",
        seconds=round(end - start, 3),
        evaluate_seconds=round(end - trained, 3),
        champions={user.user_key: user.champion_digest for user in pack.users},
        reports=tuple(reports),
    )
    # If the pack was split meanwhile, its parts count, not this record; the desk looks.
    committed = RunFolder(job.store, task.run_id).commit(record)
    post.close(len(reports) if committed else 0)
    ray.get(desk.done.remote(pack.pack_id, committed))


def _count_tokens(machine: Machine[None], desk: Any) -> Machine[None]:
    """The same machine, reporting trained tokens to the desk from time to time."""
    result: Result | None = None
    tokens, reported = 0, time.monotonic()
    while True:
        try:
            work = machine.send(result)  # type: ignore[arg-type]
        except StopIteration:
            desk.add_tokens.remote(tokens)
            return
        if isinstance(work, Train):
            batch = work.batch
            tokens += int((batch.attention_mask * (batch.input_ids >= 0)).sum())
        if time.monotonic() - reported > REPORT_S:
            desk.add_tokens.remote(tokens)
            tokens, reported = 0, time.monotonic()
        result = yield work
