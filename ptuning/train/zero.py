"""A backbone sharded over a gang with DeepSpeed ZeRO-3, whose ranks run in lock-step.

Every rank has a shard of each weight, and all ranks gather the weights together, so all must call
the backbone at the same time. Before each call they agree whether any rank has work and whether
any rank needs a backward pass; a rank without work makes an empty call. This trades time for
memory: a gather costs the same however few rows a call has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ptuning.data.encode import TemplateKind
from ptuning.methods.base import Method
from ptuning.model.backbone import Backbone
from ptuning.model.batch import EMBEDDINGS, RowPrefix
from ptuning.model.devices import choose_attention, choose_dtype, usable_device
from ptuning.model.facts import BackboneConfig
from ptuning.model.fingerprint import fingerprint_of
from ptuning.model.load import load_tokenizer, model_class, read_config, read_model
from ptuning.model.locate import locate_model
from ptuning.system import environment
from ptuning.train.step import Capture, Machine, Result, Score, T, Train, Work, prefix_of


def load_sharded(config: BackboneConfig, *, template: TemplateKind = "auto") -> Backbone:
    """Load this rank's shard of a backbone. The process group must exist.

    The weights are sharded while they are read, so no rank ever holds the full model.
    """
    device = usable_device(config.device)
    environment.set_deepspeed_defaults(device.type)
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    # DeepSpeed compiles its shared-memory op on first use, which needs a compiler on every host.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    dtype = choose_dtype(config.dtype, device)
    sharding = _sharding(dtype, device)
    source = locate_model(config.name)
    read = read_config(source)
    # from_pretrained shards while this object is alive.
    keep_alive = HfDeepSpeedConfig(sharding)
    kind = choose_attention(config.attention, device, model_class(read))
    model = read_model(source, dtype, kind)
    model.requires_grad_(False)
    del keep_alive
    return Backbone(
        model,
        load_tokenizer(source),
        name=source.name,
        fingerprint=fingerprint_of(source, read),
        template=template,
        gradient_checkpointing=config.gradient_checkpointing,
        shard=lambda full: deepspeed.initialize(model=full, config=sharding)[0].module,
    )


def _sharding(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Settings that keep a frozen model sharded; with the defaults a small model stays gathered
    (infra/decisions.md)."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 0 if device.type == "cpu" else 20_000_000,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 10_000,
            "memory_efficient_linear": True,
        },
    }


class LockstepDriver:
    """Runs this rank's machine in lock-step with its peers on a sharded backbone.

    All ranks train `method`. A rank without work uses an empty prefix of the same shapes, so that
    its backward pass visits the same weights.
    """

    def __init__(self, backbone: Backbone, method: Method) -> None:
        self.backbone = backbone
        self._shapes = method.shapes(backbone.facts)

    def run(self, machine: Machine[T]) -> T:
        """Run the machine to its end, then make empty calls until every rank is done."""
        result: Result | None = None
        value: list[T] = []
        while True:
            work: Work | None = None
            if not value:
                try:
                    work = machine.send(result)  # type: ignore[arg-type]
                except StopIteration as stop:
                    value.append(stop.value)
            any_work, backward = self._agree(work)
            if not any_work:
                return value[0]
            result = self._execute(work, backward=backward)

    def _agree(self, work: Work | None) -> tuple[bool, bool]:
        """Whether any rank has work, and whether any rank trains; the same on all ranks."""
        flags = torch.tensor(
            [work is not None, isinstance(work, Train)],
            dtype=torch.int32,
            device=self.backbone.device,
        )
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags[0]), bool(flags[1])

    def _execute(self, work: Work | None, *, backward: bool) -> Result | None:
        with torch.set_grad_enabled(backward):
            result, loss = self._forward(work, backward=backward)
            if backward:
                loss.backward()
        return result

    def _forward(self, work: Work | None, *, backward: bool) -> tuple[Result | None, Tensor]:
        """This rank's result, and a loss whose backward pass uses the layers that its peers use."""
        backbone = self.backbone
        if isinstance(work, Train):
            nll = backbone.token_nll(work.batch, prefix_of(work, backbone))
            return nll.detach(), (work.weights * nll).sum()
        if isinstance(work, Score):
            nll = backbone.token_nll(work.batch, self._scored(work, backward), work.members)
            return nll.detach(), 0.0 * nll.sum()
        ids = (
            work.input_ids
            if isinstance(work, Capture)
            else torch.zeros((1, 1), dtype=torch.long, device=backbone.device)
        )
        captured, logits = backbone.capture(ids, self._empty(len(ids), backward))
        return (captured if work is not None else None), 0.0 * logits.sum()

    def _empty(self, rows: int, backward: bool) -> RowPrefix:
        return self.backbone.empty_prefix(rows, self._shapes, requires_grad=backward)

    def _scored(self, work: Score, backward: bool) -> RowPrefix | None:
        """The prefix to score with; if peers train, it carries a gradient, which is discarded."""
        if work.prefix is None:
            return self._empty(len(work.batch.input_ids), backward)
        if not backward:
            return prefix_of(work, self.backbone)
        scored = work.prefix.of_rows(work.slots, self.backbone.dtype)
        return self._match_gradients(scored, len(work.batch.input_ids))

    def _match_gradients(self, prefix: RowPrefix, rows: int) -> RowPrefix:
        """The same prefix, requiring gradients in exactly those layers that `method` trains.

        A champion may have other layers or stacks, or be of another method. Layers that it lacks
        get keys and values that no token attends to.
        """
        empty = self._empty(rows, backward=True)
        if prefix.embeddings is None:
            prefix.embeddings = empty.embeddings
        elif EMBEDDINGS in self._shapes:
            prefix.embeddings = prefix.embeddings.detach().requires_grad_()
        length = prefix.length
        for stack in dict.fromkeys((*prefix.layers, *empty.layers)):
            given, wanted = prefix.layers.get(stack, ()), len(empty.layers.get(stack, ()))
            missing = [
                self._zeros(stack, layer, rows, length)
                for layer in range(wanted - 1, len(given) - 1, -1)
            ]
            if missing:
                depth = torch.full((rows,), len(given), device=self.backbone.device)
                prefix.depths = {**prefix.depths, stack: prefix.depths.get(stack, depth)}
            layers = [*missing, *given]
            lowest = len(layers) - wanted  # peers have no gradients below this layer
            prefix.layers[stack] = tuple(
                (_leaf(keys, n >= lowest), _leaf(values, n >= lowest))
                for n, (keys, values) in enumerate(layers)
            )
        return prefix

    def _zeros(self, stack: str, layer: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Zero keys and values for a layer, counted from the top."""
        backbone = self.backbone
        group = backbone.facts.stacks[stack].group_of(layer)
        shape = (rows, group.heads, length)
        return (
            torch.zeros((*shape, group.key_width), dtype=backbone.dtype, device=backbone.device),
            torch.zeros((*shape, group.value_width), dtype=backbone.dtype, device=backbone.device),
        )


def _leaf(values: Tensor, requires_grad: bool) -> Tensor:
    return values.detach().requires_grad_(requires_grad)
