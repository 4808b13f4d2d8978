"""One user's examples, made ready for training: splits, encoding, words, seed, digests.

The library's `tune` and the cluster's workers both come through here, so that a prefix does
not depend on which of them made it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ptuning.data.encode import Encoded, Template
from ptuning.data.examples import data_digest
from ptuning.data.layout import Layout
from ptuning.data.packing import fill_words
from ptuning.errors import DataError, MethodError, WrongMethod
from ptuning.methods.base import Method
from ptuning.model.backbone import Backbone
from ptuning.prefix.artifact import Prefix, PrefixMeta, training_digest
from ptuning.train.config import SPEED_ONLY, TrainConfig, UserRows
from ptuning.train.resume import Belongs, Resume
from ptuning.types import Example, Split, seed_of


@dataclass(frozen=True)
class Recipe:
    """All settings that decide a user's prefix, besides their rows."""

    method: Method
    train: TrainConfig
    max_length: int = 512
    prefix_name: str = "default"
    artifact_dtype: str = "float32"
    min_valid_tokens: int = 64  # with fewer, the last epoch is kept: too few to choose by


def identity(
    recipe: Recipe, backbone_fingerprint: str, template_digest: str, user_key: str, data: str
) -> str:
    """The training digest: equal digests mean that training again would give the same prefix,
    within the rounding of the backbone's dtype. With `train.start=champion` it also depends on
    the champion, which is no part of the digest: or each run would train everybody again.
    """
    train = recipe.train.model_dump(exclude=set(SPEED_ONLY))
    train["learning_rate"] = recipe.train.learning_rate or recipe.method.default_learning_rate
    return training_digest(
        recipe.method.model_dump(),
        train,
        recipe.max_length,
        recipe.prefix_name,
        recipe.artifact_dtype,
        recipe.min_valid_tokens,
        backbone_fingerprint,
        template_digest,
        user_key,
        data,
    )


def belongs(
    backbone: Backbone, recipe: Recipe, user_key: str, data: str, started_from: str = ""
) -> Belongs:
    """What a user's training state belongs to; `data` is the digest of their rows, `started_from`
    of a start that was given."""
    endless = recipe.train.model_dump(exclude={"epochs", "start", *SPEED_ONLY})
    settings = training_digest(
        recipe.method.model_dump(),
        endless,
        recipe.max_length,
        recipe.min_valid_tokens,
        backbone.template.digest,
        str(backbone.dtype),
        data,
    )
    return Belongs(user_key, recipe.prefix_name, backbone.fingerprint, settings, started_from)


def check_resume(
    backbone: Backbone, recipe: Recipe, resume: Resume, user_key: str, data: str
) -> None:
    """Raise an ArtifactError unless the state continues this user's training on these rows."""
    resume.check(
        belongs(backbone, recipe, user_key, data),
        recipe.method,
        backbone.facts,
        recipe.train.epochs,
    )


def warm_start(recipe: Recipe, backbone: Backbone, prefix: Prefix) -> tuple[dict[str, Tensor], ...]:
    """A trained prefix as what a training starts from. Raises MethodError where the backbone
    cannot do the method, WrongMethod where its prefixes have other shapes, or an ArtifactError
    where the prefix is not of this backbone."""
    prefix.check(backbone)
    method = recipe.method
    method.check(backbone.facts)
    wanted = _kind(method, method.shapes(backbone.facts))
    seen = _kind(prefix.method, prefix.shapes)
    if seen != wanted:
        raise WrongMethod(
            "the prefix to start from is not of the kind that is trained",
            seen=seen,
            expected=wanted,
            fix="train with the method and settings that the prefix was made with (keys and values "
            "of PEFT's: method.sliding_window=respect)",
        )
    return tuple({name: t.float() for name, t in own.items()} for own in prefix.members)


def _kind(method: Method, shapes: dict[str, tuple[int, ...]]) -> tuple[object, ...]:
    """What prefixes must have in common for one to be the start of another's training."""
    return shapes, method.members, _places(method.layout), method.visibility


def _places(layout: Layout | None) -> tuple[tuple[int | str, ...], ...]:
    """Where virtual tokens stand, however the template says it."""
    return () if layout is None else (layout.before, layout.after)


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
    seed = seed_of(recipe.train.seed, user_key, recipe.prefix_name)
    words, spans = _words(template, recipe.method, examples, seed)
    return UserRows(
        user_key=user_key,
        seed=seed,
        train=tuple(by_split["train"]),
        valid=tuple(by_split["valid"]),
        test=tuple(by_split["test"]),
        words=tuple(words),
        spans=tuple(spans),
    )


def check_init_text(template: Template, method: Method) -> None:
    """Raise MethodError where the words that all users start from have no tokens."""
    used = method.start_ids == "words" and method.init_text is not None
    if used and not template.ids(str(method.init_text)):
        raise MethodError(
            "the words to start from have no tokens",
            seen=f"method.init_text={method.init_text!r}",
            expected="at least one word",
            fix="change method.init_text, or leave it out to start from the users' own words",
        )


def _words(
    template: Template, method: Method, examples: Sequence[Example], seed: int
) -> tuple[list[int], list[int]]:
    """The ids that the user's prefix starts from, and how many of them each virtual token is the
    mean of ([]: one). Only train rows are looked at."""
    count = method.num_virtual_tokens * method.members
    train = [example for example in examples if example.split in (None, "train")]
    if method.start_ids == "words":
        return _real_words(template, method, train, count), []
    if method.start_ids == "vocab":
        return template.sample_ids(count, seed), []
    if method.start_ids == "labels":
        return _labels(template, method, train, seed)
    return [], []


def _labels(
    template: Template, method: Method, train: Sequence[Example], seed: int
) -> tuple[list[int], list[int]]:
    """Each member starts from the user's distinct completions, one further than the last; where
    they are fewer than its virtual tokens, the rest is drawn from the vocabulary (Lester et al.
    2021, section 3)."""
    count = method.num_virtual_tokens
    answers = [template.ids(one) for one in dict.fromkeys(_answer(example) for example in train)]
    ids = []
    for member in range(method.members):
        first = member % len(answers)
        labels = [*answers[first:], *answers[:first]][:count]
        drawn = template.sample_ids(count - len(labels), seed_of(seed, "member", member))
        ids += [*labels, *([token] for token in drawn)]
    return [token for own in ids for token in own], [len(own) for own in ids]


def _real_words(
    template: Template, method: Method, train: Sequence[Example], count: int
) -> list[int]:
    """The first `init_words` among the user's train rows, else the configured text, else the
    words of their train completions in time order."""
    given = next((row.init_words for row in train if row.init_words), method.init_text)
    if given is not None:
        ids = template.ids(given)
        if not ids:
            raise DataError(
                "the words to start from have no tokens",
                seen=repr(given),
                expected="at least one word",
                fix="change the rows' init_words or method.init_text, or leave them out",
            )
        return fill_words(ids, count)
    ids = []
    for example in train:
        if len(ids) >= count:
            break
        ids += template.ids(_answer(example))
    return fill_words(ids, count)


def _answer(example: Example) -> str:
    return example.completion or (example.messages[-1].content if example.messages else "")


def meta_of(
    backbone: Backbone,
    recipe: Recipe,
    user_key: str,
    examples: Sequence[Example],
    started_from: str = "",
) -> PrefixMeta:
    """What a prefix of this training belongs to; `started_from`: digest of a start that was
    given."""
    data = data_digest(examples)
    training = identity(recipe, backbone.fingerprint, backbone.template.digest, user_key, data)
    return PrefixMeta.of(
        backbone,
        recipe.method,
        user_key=user_key,
        prefix_name=recipe.prefix_name,
        data_digest=data,
        training_digest=training_digest(training, started_from) if started_from else training,
    )
