"""One user's examples, made ready for training: splits, encoding, words, seed, digests.

The library's `tune` and the cluster's workers both come through here, so that a prefix does
not depend on which of them made it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ptuning.artifact import PrefixMeta, training_digest
from ptuning.backbone import Backbone
from ptuning.data.encode import Encoded, Template
from ptuning.data.examples import data_digest
from ptuning.data.packing import fill_words
from ptuning.errors import DataError
from ptuning.methods.prefix import PrefixTuning
from ptuning.train.config import SPEED_ONLY, TrainConfig, UserRows
from ptuning.types import Example, Split, seed_of


@dataclass(frozen=True)
class Recipe:
    """All settings that decide a user's prefix, besides their rows."""

    method: PrefixTuning
    train: TrainConfig
    max_length: int = 512
    prefix_name: str = "default"
    artifact_dtype: str = "float32"
    min_valid_tokens: int = 64  # with fewer, the last epoch is kept: too few to choose by


def identity(
    recipe: Recipe, backbone_fingerprint: str, template_digest: str, user_key: str, data: str
) -> str:
    """The training digest: equal digests mean that training again would give the same prefix."""
    return training_digest(
        recipe.method.model_dump(),
        recipe.train.model_dump(exclude=set(SPEED_ONLY)),
        recipe.max_length,
        recipe.prefix_name,
        recipe.artifact_dtype,
        recipe.min_valid_tokens,
        backbone_fingerprint,
        template_digest,
        user_key,
        data,
    )


def prepare(
    template: Template, recipe: Recipe, user_key: str, examples: Sequence[Example]
) -> UserRows:
    """Encode a user's arranged examples (each has its split). Raises DataError on one that
    cannot be encoded (the partition quarantines those beforehand), or without train rows."""
    by_split: dict[Split, list[Encoded]] = {"train": [], "valid": [], "test": []}
    for example in examples:
        split = example.split or "train"
        by_split[split].append(template.encode(example, recipe.max_length))
    if not by_split["train"]:
        raise DataError(
            "the user has no train rows",
            seen={split: len(rows) for split, rows in by_split.items() if rows},
            fix="name 'train' as the split of some rows, or leave split out",
        )
    return UserRows(
        user_key=user_key,
        seed=seed_of(recipe.train.seed, user_key, recipe.prefix_name),
        train=tuple(by_split["train"]),
        valid=tuple(by_split["valid"]),
        test=tuple(by_split["test"]),
        words=tuple(_words(template, recipe, examples)),
    )


def _words(template: Template, recipe: Recipe, examples: Sequence[Example]) -> list[int]:
    """P ids of real words: the first `init_words` among the user's train rows, else the words
    of their train completions in time order."""
    if not recipe.method.needs_words:
        return []
    train = [example for example in examples if example.split in (None, "train")]
    given = [example.init_words for example in train if example.init_words]
    ids = template.ids(given[0]) if given else []
    for example in train:
        if ids and (given or len(ids) >= recipe.method.num_virtual_tokens):
            break
        text = example.completion or (example.messages[-1].content if example.messages else "")
        ids += template.ids(text)
    return fill_words(ids, recipe.method.num_virtual_tokens)


def meta_of(
    backbone: Backbone, recipe: Recipe, user_key: str, examples: Sequence[Example]
) -> PrefixMeta:
    """What a prefix of this training belongs to."""
    data = data_digest(examples)
    return PrefixMeta(
        method=recipe.method.model_dump(),
        backbone=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
        template_digest=backbone.template.digest,
        user_key=user_key,
        prefix_name=recipe.prefix_name,
        data_digest=data,
        training_digest=identity(
            recipe, backbone.fingerprint, backbone.template.digest, user_key, data
        ),
    )
