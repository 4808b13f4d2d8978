"""What decides a training, as digests: equal digests mean that training again gives the same
prefix, within the rounding of the backbone's dtype.

A run compares the digest of what it would train with that of what there is, so a value that decides
a prefix and is left out here would leave users with prefixes of older settings for ever.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ptuning.methods.base import Method
from ptuning.model.backbone import Backbone
from ptuning.prefix.artifact import ArtifactConfig, PrefixMeta, training_digest
from ptuning.train.config import SPEED_ONLY, TrainConfig
from ptuning.train.resume import Belongs

# The version of the code's rules: raise it where the same rows and settings train to other values
# than before (a test holds a small training to known ones). Everybody trains again then.
RULES = "2"


@dataclass(frozen=True)
class Recipe:
    """All settings that decide a user's prefix, besides their rows and the backbone."""

    method: Method
    train: TrainConfig
    max_length: int = 512
    prefix_name: str = "default"
    artifact: ArtifactConfig = field(default_factory=ArtifactConfig)


@dataclass(frozen=True)
class BackboneIdentity:
    """What of a backbone decides a training. `dtype` is the one that it computes in, as
    "bfloat16": never "auto", which other machines decide otherwise."""

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
    """The training digest: SHA-256, in hex, of all that decides a user's prefix.

    `data_digest` is of the user's rows; `started_from` is the digest of a prefix that the training
    began as, however often it went on since. A prefix file always says it, so that two files of one
    training digest hold the same prefix. What a run plans never does: the champion moves with each
    promotion, and everybody would train again each night.
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
    """What a prefix of this training says of itself; arguments as of `digest_training`."""
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
    """What a training state of this training belongs to: all but the number of epochs."""
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
