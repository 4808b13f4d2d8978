"""The two tasks of the quality benchmark: which rows, and how answers are scored. No model.

E2E (table to text) is one user; the LAMA cloze task has a user per relation, among them
relations that share a template or a kind of object, so that a prefix must tell them apart.
"""

from __future__ import annotations

import os
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
from sacrebleu.metrics import BLEU

import ptuning
from ptuning.types import SPLITS, Split, seed_of

# Of the relations with the most rows, those whose template ends in the object, and whose
# commonest object is far from being the answer to most questions.
RELATIONS = ("P17", "P37", "P159", "P176", "P495")


@dataclass(frozen=True)
class Sizes:
    """Rows of each user (their prompts are distinct)."""

    train: int
    valid: int
    test: int


@dataclass(frozen=True)
class Spec:
    """A task. `template` is how a row is written for the model (data.template)."""

    file: str
    template: Literal["chat", "plain"]
    metric: Literal["bleu", "exact_match"]
    max_new_tokens: int
    full: Sizes
    quick: Sizes


SPECS = {
    "e2e": Spec("e2e.parquet", "chat", "bleu", 60, Sizes(200, 100, 100), Sizes(48, 16, 24)),
    # A cloze is continued as it stands; a chat's turn would make a question of it.
    "lama": Spec(
        "lama-trex.parquet", "plain", "exact_match", 8, Sizes(100, 30, 60), Sizes(40, 20, 40)
    ),
}


@dataclass(frozen=True)
class Question:
    """A prompt and all of its right answers."""

    prompt: str
    answers: tuple[str, ...]


@dataclass
class Rows:
    """A task's rows by user: what is trained on (with `split` set), and what is asked."""

    examples: dict[str, list[ptuning.Example]] = field(default_factory=dict)
    test: dict[str, list[Question]] = field(default_factory=dict)


# Answers by prompt, by split, by user.
Pool = dict[str, dict[str, dict[str, list[str]]]]


def shared_data() -> Path:
    """The folder of the shared data sets; it need not exist."""
    given = os.environ.get("PTUNING_SHARED_DATA")
    return Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "data"


def absent(folder: Path, tasks: Sequence[str]) -> str | None:
    """Why the tasks cannot be read from a folder, or None."""
    missing = [SPECS[task].file for task in tasks if not (folder / SPECS[task].file).is_file()]
    if not missing:
        return None
    return f"no {', '.join(missing)} in {folder}: set PTUNING_SHARED_DATA to the shared data"


def read_pool(task: str, folder: Path) -> Pool:
    table = pq.read_table(folder / SPECS[task].file).to_pylist()
    return e2e_pool(table) if task == "e2e" else lama_pool(table)


def e2e_pool(table: Sequence[Mapping[str, str]]) -> Pool:
    pool = _empty_pool()
    for row in table:
        pool["e2e"][row["split"]][row["mr"]].append(row["ref"])
    return pool


def lama_pool(table: Sequence[Mapping[str, str]]) -> Pool:
    pool = _empty_pool()
    for row in table:
        if row["relation"] in RELATIONS:
            prompt = cloze(row["template"], row["sub_label"])
            # Prompt and completion are tokenised apart: the blank belongs to the word after it.
            pool[row["relation"]][row["split"]][prompt].append(f" {row['obj_label']}")
    return pool


def _empty_pool() -> Pool:
    return defaultdict(lambda: {split: defaultdict(list) for split in SPLITS})


def cloze(template: str, subject: str) -> str:
    """The template's text up to the object, which comes last: `Paris is located in`."""
    before, found, after = template.partition(" [Y]")
    if not found or after.strip() != "." or "[X]" not in before:
        raise ValueError(f"the object does not come last in {template!r}")
    return before.replace("[X]", subject)


def draw_rows(pool: Pool, sizes: Sizes, seed: int) -> Rows:
    """A seed's rows. It chooses the train rows only: all seeds are judged on the same ones."""
    rows = Rows()
    for user in sorted(pool):
        by_split = pool[user]
        train = _draw(user, by_split, "train", sizes.train, seed)
        valid = _draw(user, by_split, "valid", sizes.valid, 0)
        chosen: list[tuple[Split, list[Question]]] = [("train", train), ("valid", valid)]
        rows.examples[user] = [
            ptuning.Example(prompt=one.prompt, completion=one.answers[0], split=split)
            for split, questions in chosen
            for one in questions
        ]
        rows.test[user] = _draw(user, by_split, "test", sizes.test, 0)
    return rows


def _draw(
    user: str,
    by_split: Mapping[str, Mapping[str, Sequence[str]]],
    split: str,
    count: int,
    seed: int,
) -> list[Question]:
    """`count` prompts, each with its answers in a drawn order: the first is trained on."""

    def rank(text: str) -> tuple[int, str]:
        return seed_of("bench", user, split, seed, text), text

    answers = by_split[split]
    if len(answers) < count:
        raise ValueError(f"{user} has {len(answers)} {split} prompts, fewer than {count}")
    return [
        Question(prompt, tuple(sorted(dict.fromkeys(answers[prompt]), key=rank)))
        for prompt in sorted(answers, key=rank)[:count]
    ]


def scored_rows(questions: Sequence[Question]) -> list[ptuning.Example]:
    """The rows of which the loss is taken: every question with its first answer."""
    return [ptuning.Example(prompt=one.prompt, completion=one.answers[0]) for one in questions]


def scores(
    metric: str, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """The metrics of a task's answers, each against all right ones."""
    if metric == "bleu":
        return {"bleu": round(bleu(answers, references), 3)}
    return {
        "exact_match": round(exact_match(answers, references), 4),
        "first_word_match": round(first_word_match(answers, references), 4),
    }


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (sacrebleu's defaults: 13a tokens, case kept) with any number of references."""
    if not answers:
        return 0.0
    streams = [list(stream) for stream in zip_longest(*references)]
    return float(BLEU().corpus_score([answer.strip() for answer in answers], streams).score)


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of answers that are one of their references."""
    return _share(
        normalised(answer) in {normalised(one) for one in own}
        for answer, own in zip(answers, references, strict=True)
    )


def first_word_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share whose first word is right: what a model knows that was never taught to stop."""
    firsts = [(answer.split() or [""])[0] for answer in answers]
    return exact_match(firsts, references)


def normalised(text: str) -> str:
    return text.strip().casefold().rstrip(string.punctuation + string.whitespace)


def commonest_match(rows: Rows) -> float:
    """The exact match of always giving a user's commonest train answer."""
    hits: list[bool] = []
    for user, questions in rows.test.items():
        train = [one.completion or "" for one in rows.examples[user] if one.split == "train"]
        ((guess, _),) = Counter(train).most_common(1)
        hits += [guess in one.answers for one in questions]
    return _share(hits)


def _share(hits: Iterable[bool]) -> float:
    listed = list(hits)
    return sum(listed) / len(listed) if listed else 0.0
