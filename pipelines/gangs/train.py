"""Train a plan's packs on one Ray Train gang whose workers load the backbone once.

A worker that dies takes the gang's processes with it; the gang starts again and goes on with
the packs that have no done-record. Outputs are committed by writing that record, once.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipelines.config import RayConfig
from pipelines.done_record import DoneRecord
from pipelines.gangs.board import TICK_S, PackPost, Progress, Watch, start_board
from pipelines.gangs.cluster import Gang
from pipelines.gangs.meeting import join_peers, leave_peers
from pipelines.gangs.worker import PackJob, pack_machine
from pipelines.plan import Pack, Plan, assign
from pipelines.run_folder import RunFolder
from ptuning.data.encode import TemplateKind
from ptuning.errors import RunError
from ptuning.identity import Recipe
from ptuning.model.backbone import Backbone
from ptuning.model.devices import choose_device
from ptuning.model.facts import BackboneConfig
from ptuning.model.load import load_backbone
from ptuning.store import Store
from ptuning.train.step import Driver, LocalDriver, Machine, Train


@dataclass(frozen=True)
class GangTask:
    """What a worker is told. Plain values only: it travels to other hosts."""

    store: str
    run_id: str
    partition_id: str
    recipe: Recipe
    backbone: BackboneConfig  # dtype and attention resolved
    template: TemplateKind
    threads: int


def tune(plan: Plan, task: GangTask, shape: Gang, config: RayConfig, progress: Progress) -> None:
    """Train every pack that has no done-record. Raises RunError if the gang cannot finish."""
    folder = RunFolder(Store(task.store), task.run_id)
    done = folder.done_packs()
    remaining = [pack for pack in plan.packs if pack.pack_id not in done]
    before = sum(len(pack.users) for pack in plan.packs if pack.pack_id in done)
    progress(before, 0)
    if not remaining:
        return
    # A sharded gang keeps all its workers, since each holds a part of the weights.
    whole = task.backbone.sharding == "replicate"
    workers = min(shape.workers, len(remaining)) if whole else shape.workers
    board = start_board()
    # Without a process group: replicated workers have nothing to say to each other, and nothing
    # that listens is opened for it. Sharded ones join one themselves (meeting.py).
    # What a worker is told is bound to its function, not given as `train_loop_config`: Ray's
    # controller reads that too, and would import torch and Transformers for it (4 CPU seconds).
    work = partial(
        _work,
        task=task,
        plan=plan,
        board=board,
        backend="nccl" if shape.gpus else "gloo",
        timeout_s=config.timeout_s,
    )
    trainer = DataParallelTrainer(
        work,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=bool(shape.gpus),
            resources_per_worker={
                "CPU": shape.cpus,
                **({"GPU": shape.gpus} if shape.gpus else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=f"gang-{task.run_id}",
            storage_path=folder.scratch,
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    with Watch(board, progress, before):
        try:
            trainer.fit()
        except Exception as error:
            raise RunError(
                "the training gang failed",
                seen=_root_cause(error),
                fix="mend the cause and run the same command again; committed users are kept",
            ) from error
    missing = len({pack.pack_id for pack in plan.packs} - folder.done_packs())
    if missing:
        raise RunError("the gang ended without training every pack", seen=f"{missing} packs left")


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    causes = [f"worker {rank}: {failure}" for rank, failure in sorted(failures.items())]
    lines = [line for line in "\n".join(causes or [str(error)]).splitlines() if line.strip()]
    return " | ".join(lines[:1] + lines[-2:]) if len(lines) > 3 else " | ".join(lines)


def _work(*, task: GangTask, plan: Plan, board: Any, backend: str, timeout_s: float) -> None:
    """A gang member: load the backbone, then train its share of what is not done yet."""
    torch.set_num_threads(max(1, task.threads))
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    store = Store(task.store)
    done = RunFolder(store, task.run_id).done_packs()
    # Shares are of the whole plan: ranks that list `done` at different moments must agree.
    share = [pack for pack in assign(plan.packs, size)[rank] if pack.pack_id not in done]
    sharded = task.backbone.sharding == "zero3"
    if not sharded and not share:
        return
    if sharded:
        join_peers(backend, timeout_s)
    try:
        backbone, driver = _load(task)
        job = PackJob(store, task.partition_id, task.recipe)
        attempt = f"{rank}-{os.getpid()}"
        driver.run(_counted(_all_packs(backbone, job, task, share, attempt, board), board))
    finally:
        leave_peers()


def _load(task: GangTask) -> tuple[Backbone, Driver]:
    chosen = task.backbone
    if chosen.device == "auto":  # Ray shows a worker its own GPUs only
        device = str(choose_device("auto"))
        chosen = chosen.model_copy(update={"device": device})
    if chosen.sharding == "zero3":
        from ptuning.train.zero import LockstepDriver, load_sharded

        backbone = load_sharded(chosen, template=task.template)
        return backbone, LockstepDriver(backbone, task.recipe.method)
    backbone = load_backbone(chosen, template=task.template)
    return backbone, LocalDriver(backbone)


def _all_packs(
    backbone: Backbone, job: PackJob, task: GangTask, share: list[Pack], attempt: str, board: Any
) -> Machine[None]:
    """A worker's whole work as one machine: idle peers of a sharded gang wait inside it."""
    before = backbone.checksum()
    for pack in share:
        start = time.monotonic()
        post = PackPost(board, pack.pack_id)
        reports = yield from pack_machine(backbone, job, pack, post.add_user)
        backbone.verify_unchanged(before)
        record = DoneRecord(
            pack_id=pack.pack_id,
            attempt=attempt,
            seconds=round(time.monotonic() - start, 3),
            champions={user.user_key: user.champion_digest for user in pack.users},
            reports=tuple(reports),
        )
        RunFolder(job.store, task.run_id).commit(record)
        post.close(len(reports))


def _counted(machine: Machine[None], board: Any) -> Machine[None]:
    """The same machine, telling the board now and then how many tokens were trained."""
    result, tokens, told = None, 0, time.monotonic()
    while True:
        try:
            work = machine.send(result)  # type: ignore[arg-type]
        except StopIteration:
            board.add_tokens.remote(tokens)
            return
        if isinstance(work, Train):
            batch = work.batch
            tokens += int((batch.attention_mask * (batch.input_ids >= 0)).sum())
        if time.monotonic() - told > TICK_S:
            board.add_tokens.remote(tokens)
            tokens, told = 0, time.monotonic()
        result = yield work
