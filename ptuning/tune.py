"""Tune many users in this process: the library's own entry, without any cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ptuning.artifact import ArtifactConfig, Prefix, make_prefix
from ptuning.backbone import Backbone
from ptuning.data.examples import DataConfig, arrange, too_few
from ptuning.errors import PTuningError
from ptuning.methods.prefix import PrefixTuning
from ptuning.train.config import TrainConfig, Trained, UserRows
from ptuning.train.packed import train_pack
from ptuning.train.step import LocalDriver
from ptuning.types import EpochLoss, Example, user_key
from ptuning.users import Recipe, meta_of, prepare


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """One user's outcome. `prefix` is None unless `status` is "trained"."""

    status: Literal["trained", "too_few", "failed"]
    prefix: Prefix | None = None
    history: list[EpochLoss] = field(default_factory=list)
    error: str | None = None


def tune(
    backbone: Backbone,
    users: Mapping[str, Sequence[Example]],
    *,
    method: PrefixTuning | None = None,
    train: TrainConfig | None = None,
    data: DataConfig | None = None,
    artifact: ArtifactConfig | None = None,
    prefix_name: str = "default",
) -> dict[str, TuneResult]:
    """Train one prefix per user, many users in one forward pass.

    `users` maps user ids to their examples; rows without a split are split by time
    (DataConfig). The result has every user of `users`. The backbone's weights are compared
    before and after; raises BackboneChanged if they differ.
    """
    data = data or DataConfig()
    artifact = artifact or ArtifactConfig()
    recipe = Recipe(
        method or PrefixTuning(),
        train or TrainConfig(),
        data.max_length,
        prefix_name,
        artifact.dtype,
    )
    before = backbone.checksum()
    results: dict[str, TuneResult] = {}
    ready: list[tuple[str, list[Example], UserRows]] = []
    for user_id, examples in users.items():
        try:
            if too_few(arrange(examples), data.min_examples):
                results[user_id] = TuneResult(status="too_few")
                continue
            rows = arrange(examples, data.max_rows)
            ready.append(
                (user_id, rows, prepare(backbone.template, recipe, user_key(user_id), rows))
            )
        except (PTuningError, UnicodeError) as error:  # UnicodeError: text that is no Unicode
            results[user_id] = TuneResult(status="failed", error=str(error))
    size = recipe.train.pack_users
    for at in range(0, len(ready), size):
        pack = ready[at : at + size]
        machine = train_pack(
            backbone,
            recipe.method,
            recipe.train,
            [rows for _, _, rows in pack],
            recipe.min_valid_tokens,
        )
        for (user_id, rows, _), trained in zip(
            pack, LocalDriver(backbone).run(machine), strict=True
        ):
            results[user_id] = _result(backbone, recipe, artifact, user_id, rows, trained)
    backbone.verify_unchanged(before)
    return {user_id: results[user_id] for user_id in users}


def _result(
    backbone: Backbone,
    recipe: Recipe,
    artifact: ArtifactConfig,
    user_id: str,
    rows: Sequence[Example],
    trained: Trained,
) -> TuneResult:
    if trained.kv is None:
        return TuneResult(status="failed", history=trained.history, error=trained.error)
    meta = meta_of(backbone, recipe, user_key(user_id), rows)
    prefix = make_prefix(trained.kv, meta, artifact)
    return TuneResult(status="trained", prefix=prefix, history=trained.history)
