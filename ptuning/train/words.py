"""Choose the token ids that initialise a user's prefix."""

from __future__ import annotations

from collections.abc import Sequence

from ptuning.data.encode import Template
from ptuning.data.packing import fill_words
from ptuning.errors import DataError, MethodError
from ptuning.methods.base import Method
from ptuning.types import Example, seed_of


def check_init_text(template: Template, method: Method) -> None:
    """Raise MethodError if `method.init_text` is set but has no tokens."""
    used = method.start_ids == "words" and method.init_text is not None
    if used and not template.ids(str(method.init_text)):
        raise MethodError(
            "the init words have no tokens",
            seen=f"method.init_text={method.init_text!r}",
            expected="at least one word",
            fix="change method.init_text, or omit it to start from words of each user's rows",
        )


def choose_init_ids(
    template: Template, method: Method, examples: Sequence[Example], seed: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that initialise a user's prefix, and their spans: how many ids each virtual token is
    the mean of; () if one each. Uses train rows only. Raises DataError if the user's init words
    have no tokens."""
    count = method.num_virtual_tokens * method.members
    train = [example for example in examples if example.split in (None, "train")]
    if method.start_ids == "words":
        return tuple(_take_words(template, method, train, count)), ()
    if method.start_ids == "vocab":
        return tuple(template.sample_ids(count, seed)), ()
    if method.start_ids == "labels":
        return _take_labels(template, method, train, seed)
    return (), ()


def _take_labels(
    template: Template, method: Method, train: Sequence[Example], seed: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The user's distinct completions, rotated by one for each further member. If there are fewer
    than the virtual tokens, the rest is drawn from the vocabulary (Lester et al. 2021, section 3).
    """
    count = method.num_virtual_tokens
    answers = [template.ids(text) for text in dict.fromkeys(_answer_of(row) for row in train)]
    ids: list[list[int]] = []
    for member in range(method.members):
        first = member % len(answers)
        labels = [*answers[first:], *answers[:first]][:count]
        drawn = template.sample_ids(count - len(labels), seed_of(seed, "member", member))
        ids += [*labels, *([token] for token in drawn)]
    return tuple(token for label in ids for token in label), tuple(len(label) for label in ids)


def _take_words(
    template: Template, method: Method, train: Sequence[Example], count: int
) -> list[int]:
    """The first `init_words` in the user's train rows, or else `method.init_text`, or else the
    words of the train completions in time order."""
    given = next((row.init_words for row in train if row.init_words), method.init_text)
    if given is not None:
        ids = template.ids(given)
        if not ids:
            raise DataError(
                "the init words have no tokens",
                seen=repr(given),
                expected="at least one word",
                fix="change or omit the rows' init_words or method.init_text",
            )
        return fill_words(ids, count)
    ids = []
    for example in train:
        if len(ids) >= count:
            break
        ids += template.ids(_answer_of(example))
    return fill_words(ids, count)


def _answer_of(example: Example) -> str:
    return example.completion or (example.messages[-1].content if example.messages else "")
