"""Digests of everything that determines a training: equal digests mean that training again gives
the same prefix, within the rounding of the backbone's dtype.

A run compares the digest of what it would train with the digest of the existing prefix. If a
setting that affects the result were missing here, users would keep prefixes of old settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ptuning.methods.base import Method
from ptuning.model.backbone import Backbone
from ptuning.prefix.artifact import ArtifactConfig, PrefixMeta, training_digest
from ptuning.train.config import SPEED_ONLY, TrainConfig
from ptuning.train.resume import Belongs

# The version of the training code. Raise it when the same rows and settings give other values than
# before (a test compares a small training with known values). All users are then trained again.
RULES = "2"


@dataclass(frozen=True)
class Recipe:
    """All settings that determine a user's prefix, apart from the rows and the backbone."""

    method: Method
    train: TrainConfig
    max_length: int = 512
    prefix_name: str = "default"
    artifact: ArtifactConfig = field(default_factory=ArtifactConfig)


@dataclass(frozen=True)
class BackboneIdentity:
    """The properties of a backbone that affect a training. `dtype` is the dtype it computes in,
    such as "bfloat16", never "auto", which differs between machines."""

    fingerprint: str
    dtype: str
    template_digest: str

    @classmethod
    def of(cls, backbone: Backbone) -> BackboneIdentity:
        dtype = str(backbone.dtype).removeprefix("torch.")
        return cls(backbone.fingerprint, dtype, backbone.template.digest)


def digest_training(
    recipe: Recipe,
    backbone: BackboneIdentity,
    user_key: str,
    data_digest: str,
    started_from: str = "",
) -> str:
    """The training digest: SHA-256, in hex, of everything that determines a user's prefix.

    `data_digest` is of the user's rows. `started_from` is the digest of the prefix that the
    training started from, even if it was resumed since. A prefix file's digest includes it, so two
    files with the same training digest have the same prefix. A plan's digest does not: the champion
    changes with each promotion, and all users would be trained again every night.
    """
    train = recipe.train.model_dump(exclude=set(SPEED_ONLY))
    train["learning_rate"] = recipe.train.learning_rate or recipe.method.default_learning_rate
    parts = [
        RULES,
        recipe.method.model_dump(),
        train,
        recipe.max_length,
        recipe.prefix_name,
        recipe.artifact.model_dump(),
        vars(backbone),
        user_key,
        data_digest,
    ]
    return training_digest(*parts, *([started_from] if started_from else []))


def describe_prefix(
    backbone: Backbone, recipe: Recipe, user_key: str, data_digest: str, started_from: str = ""
) -> PrefixMeta:
    """The metadata of a prefix from this training; for the arguments see `digest_training`."""
    known = BackboneIdentity.of(backbone)
    return PrefixMeta.of(
        backbone,
        recipe.method,
        user_key=user_key,
        prefix_name=recipe.prefix_name,
        data_digest=data_digest,
        training_digest=digest_training(recipe, known, user_key, data_digest, started_from),
    )


def describe_state(
    backbone: Backbone, recipe: Recipe, user_key: str, data_digest: str, started_from: str = ""
) -> Belongs:
    """What a training state of this training belongs to; the number of epochs is left out, so that
    it can be raised."""
    without_end = recipe.train.model_dump(exclude={"epochs", "start", *SPEED_ONLY})
    known = BackboneIdentity.of(backbone)
    settings = training_digest(
        RULES,
        recipe.method.model_dump(),
        without_end,
        recipe.max_length,
        known.dtype,
        known.template_digest,
        data_digest,
    )
    return Belongs(user_key, recipe.prefix_name, known.fingerprint, settings, started_from)
