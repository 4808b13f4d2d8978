"""The two tasks of the quality benchmark: their rows and their metrics. No model.

E2E (table to text) has one user. The LAMA cloze task has one user per relation. Some relations
share a template or a kind of object, so that a prefix must learn its relation.
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

# The relations with the most rows whose template ends with the object and whose most frequent
# object is the answer to few questions.
RELATIONS = ("P17", "P37", "P159", "P176", "P495")


@dataclass(frozen=True)
class Sizes:
    """Rows per user and split. A user's prompts are distinct."""

    train: int
    valid: int
    test: int


@dataclass(frozen=True)
class Spec:
    """A task. `template` is the setting data.template."""

    file: str
    template: Literal["chat", "plain"]
    metric: Literal["bleu", "exact_match"]
    max_new_tokens: int
    full: Sizes
    quick: Sizes


SPECS = {
    "e2e": Spec("e2e.parquet", "chat", "bleu", 60, Sizes(200, 100, 100), Sizes(48, 16, 24)),
    # A cloze is text to be continued; a chat template would turn it into a question.
    "lama": Spec(
        "lama-trex.parquet", "plain", "exact_match", 8, Sizes(100, 30, 60), Sizes(40, 20, 40)
    ),
}


@dataclass(frozen=True)
class Question:
    """A prompt and all its correct answers."""

    prompt: str
    answers: tuple[str, ...]


@dataclass
class Rows:
    """A task's rows by user: examples for training (with `split` set), and test questions."""

    examples: dict[str, list[ptuning.Example]] = field(default_factory=dict)
    test: dict[str, list[Question]] = field(default_factory=dict)


# Answers by prompt, by split, by user.
Pool = dict[str, dict[str, dict[str, list[str]]]]


def find_data_folder() -> Path:
    """The folder of the shared data sets, whether or not it exists."""
    given = os.environ.get("PTUNING_SHARED_DATA")
    return Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "data"


def explain_absence(folder: Path, tasks: Sequence[str]) -> str | None:
    """Why the tasks cannot be read from a folder; None if they can."""
    missing = [SPECS[task].file for task in tasks if not (folder / SPECS[task].file).is_file()]
    if not missing:
        return None
    return f"no {', '.join(missing)} in {folder}: set PTUNING_SHARED_DATA to the data folder"


def read_pool(task: str, folder: Path) -> Pool:
    table = pq.read_table(folder / SPECS[task].file).to_pylist()
    return make_e2e_pool(table) if task == "e2e" else make_lama_pool(table)


def make_e2e_pool(table: Sequence[Mapping[str, str]]) -> Pool:
    pool = _empty_pool()
    for row in table:
        pool["e2e"][row["split"]][row["mr"]].append(row["ref"])
    return pool


def make_lama_pool(table: Sequence[Mapping[str, str]]) -> Pool:
    pool = _empty_pool()
    for row in table:
        if row["relation"] in RELATIONS:
            prompt = make_cloze(row["template"], row["sub_label"])
            # Prompt and completion are tokenised separately: the space belongs to the completion.
            pool[row["relation"]][row["split"]][prompt].append(f" {row['obj_label']}")
    return pool


def _empty_pool() -> Pool:
    return defaultdict(lambda: {split: defaultdict(list) for split in SPLITS})


def make_cloze(template: str, subject: str) -> str:
    """The template's text before the object, such as `Paris is located in`. Raises ValueError if
    the object does not come last."""
    before, found, after = template.partition(" [Y]")
    if not found or after.strip() != "." or "[X]" not in before:
        raise ValueError(f"the object does not come last in {template!r}")
    return before.replace("[X]", subject)


def draw_rows(pool: Pool, sizes: Sizes, seed: int) -> Rows:
    """Draw a seed's rows. The seed only affects train rows: validation and test rows are the same
    for all seeds."""
    rows = Rows()
    for user in sorted(pool):
        by_split = pool[user]
        train = _draw(user, by_split, "train", sizes.train, seed)
        valid = _draw(user, by_split, "valid", sizes.valid, 0)
        chosen: list[tuple[Split, list[Question]]] = [("train", train), ("valid", valid)]
        rows.examples[user] = [
            ptuning.Example(prompt=question.prompt, completion=question.answers[0], split=split)
            for split, questions in chosen
            for question in questions
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
    """Draw `count` prompts, each with its answers in random order; the first is trained on."""

    def rank(text: str) -> tuple[int, str]:
        return seed_of("bench", user, split, seed, text), text

    answers = by_split[split]
    if len(answers) < count:
        raise ValueError(f"{user} has {len(answers)} {split} prompts, fewer than {count}")
    return [
        Question(prompt, tuple(sorted(dict.fromkeys(answers[prompt]), key=rank)))
        for prompt in sorted(answers, key=rank)[:count]
    ]


def make_scored_rows(questions: Sequence[Question]) -> list[ptuning.Example]:
    """The rows whose loss is measured: every question with its first answer."""
    return [
        ptuning.Example(prompt=question.prompt, completion=question.answers[0])
        for question in questions
    ]


def score_answers(
    metric: str, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """A task's metrics. Each answer is compared with all its correct answers (`references`)."""
    if metric == "bleu":
        return {"bleu": round(compute_bleu(answers, references), 3)}
    return {
        "exact_match": round(compute_exact_match(answers, references), 4),
        "first_word_match": round(compute_first_word_match(answers, references), 4),
    }


def compute_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (sacrebleu's defaults: 13a tokens, case kept) with any number of references."""
    if not answers:
        return 0.0
    streams = [list(stream) for stream in zip_longest(*references)]
    return float(BLEU().corpus_score([answer.strip() for answer in answers], streams).score)


def compute_exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of answers that equal one of their references."""
    return _compute_share(
        normalise(answer) in {normalise(text) for text in correct}
        for answer, correct in zip(answers, references, strict=True)
    )


def compute_first_word_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of answers whose first word is correct. It credits the base model, which has not
    learned to stop after the answer."""
    firsts = [(answer.split() or [""])[0] for answer in answers]
    return compute_exact_match(firsts, references)


def normalise(text: str) -> str:
    return text.strip().casefold().rstrip(string.punctuation + string.whitespace)


def compute_commonest_match(rows: Rows) -> float:
    """The exact match of always giving the user's most frequent train answer."""
    hits: list[bool] = []
    for user, questions in rows.test.items():
        train = [row.completion or "" for row in rows.examples[user] if row.split == "train"]
        ((guess, _),) = Counter(train).most_common(1)
        hits += [guess in question.answers for question in questions]
    return _compute_share(hits)


def _compute_share(hits: Iterable[bool]) -> float:
    listed = list(hits)
    return sum(listed) / len(listed) if listed else 0.0
