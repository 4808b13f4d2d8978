"""Compare the tuning methods: quality, parameters per user, training seconds.

    python -m infra.bench.methods --quick              one seed of five settings
    python -m infra.bench.methods                      the grid: hours; run it again to resume
    python -m infra.bench.methods --list               the cells, and which are done
    python -m infra.bench.methods --table              the results file as Markdown tables
    python -m infra.bench.methods --overview           one table of both tasks (benchmarks.md)
    python -m infra.bench.methods --learning-rates prompt ptuning-none    sweep learning rates

SmolLM2 is tuned with few rows on E2E (table to text, BLEU) and on LAMA's triples as a cloze task
(exact match). Each setting differs in one respect from Prefix Tuning with 10 virtual tokens. A cell
is a task, a setting and a seed. When it is done, its record is appended to the results file. Cells
with a record of the same settings are not run again.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import ptuning
from infra.bench import products, records, tasks
from infra.bench.records import Record, Results
from ptuning.data.examples import arrange, data_digest
from ptuning.identity import Recipe, describe_prefix
from ptuning.methods.base import Method
from ptuning.methods.catalogue import AnyMethod
from ptuning.model.facts import Facts
from ptuning.pack import encode_user
from ptuning.prefix.artifact import make_prefix, pack_prefix, training_digest
from ptuning.scoring import score_split
from ptuning.train.config import SPEED_ONLY, Trained
from ptuning.train.packed import train_pack
from ptuning.train.step import LocalDriver
from ptuning.types import Example, user_key

BACKBONE = "smollm2"
VERSION = 1  # of what a cell measures; a new version makes all records outdated
RESULTS = Path(__file__).parent / "results" / "methods.jsonl"
RATES_RESULTS = Path(__file__).parent / "results" / "learning-rates.jsonl"
# Not in git.
QUICK_RESULTS = Path(__file__).parents[2] / ".cache" / "bench" / "methods-quick.jsonl"

EPOCHS, QUICK_EPOCHS = 5, 3
QUICK = ("base", "prefix", "prefix-mlp", "prompt", "ptuning-mlp")
RATES = (3e-3, 1e-2, 2e-2, 3e-2, 1e-1)
ENCODER_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
# The learning rates of tasks on which a sweep at full size found a better one than the method's
# default (infra/decisions.md), by task and setting. A setting without an entry uses that of the
# setting swept for its kind (Setting.swept).
TUNED_RATES = {
    ("e2e", "prefix"): 3e-2,
    ("lama", "prefix"): 1e-2,
    ("lama", "prefix-random"): 2e-2,
    ("lama", "prefix-top"): 3e-2,
    ("lama", "prefix-infix"): 3e-2,
}
GENERATED_ROWS = 64  # per batch


@dataclass(frozen=True)
class Setting:
    """A method with settings, or the base model (`method` None). `only`: the one task that it
    applies to."""

    name: str
    label: str
    method: AnyMethod | None = None
    only: str | None = None

    @property
    def encoder(self) -> bool:
        """Whether an encoder network produces the prefix. Encoders need smaller learning rates."""
        if isinstance(self.method, ptuning.PTuning):
            return self.method.encoder != "none"
        return getattr(self.method, "encoder_hidden_size", None) is not None

    @property
    def swept(self) -> str:
        """The setting whose sweep is used for all settings that train the same kind of values."""
        if isinstance(self.method, ptuning.PTuning):
            return f"ptuning-{self.method.encoder}"
        if isinstance(self.method, ptuning.PrefixTuning) and not self.method.embedding_only:
            return "prefix-mlp" if self.encoder else "prefix"
        return "prompt"


def _prefix(**changes: Any) -> ptuning.PrefixTuning:
    return ptuning.PrefixTuning(**{"num_virtual_tokens": 10, **changes})


def _prompt(**changes: Any) -> ptuning.PromptTuning:
    return ptuning.PromptTuning(**{"num_virtual_tokens": 10, **changes})


def _ptuning(encoder: str, template: str = "{p:5}{prompt}{p:5}{completion}") -> ptuning.PTuning:
    return ptuning.PTuning(encoder=encoder, template=template)


SETTINGS = (
    Setting("base", "base model, no prefix"),
    Setting("prefix", "prefix: 10 virtual tokens, direct, words", _prefix()),
    Setting("prefix-p1", "prefix: 1 virtual token", _prefix(num_virtual_tokens=1)),
    Setting("prefix-p20", "prefix: 20 virtual tokens", _prefix(num_virtual_tokens=20)),
    Setting("prefix-random", "prefix: random init", _prefix(init="random")),
    Setting("prefix-mlp", "prefix: MLP 512, words", _prefix(encoder_hidden_size=512)),
    Setting(
        "prefix-mlp-random",
        "prefix: MLP 512, random init",
        _prefix(encoder_hidden_size=512, init="random"),
    ),
    Setting("prefix-top", "prefix: top third of the layers (10 of 30)", _prefix(layers=10)),
    Setting("prefix-embedding", "prefix: embedding only", _prefix(layers="embedding")),
    Setting(
        "prefix-embedding-infix",
        "prefix: embedding only, infix",
        _prefix(layers="embedding", placement="infix"),
    ),
    Setting("prefix-infix", "prefix: infix", _prefix(placement="infix")),
    Setting("prompt", "prompt: 10 virtual tokens, text init", _prompt()),
    Setting("prompt-p20", "prompt: 20 virtual tokens", _prompt(num_virtual_tokens=20)),
    Setting("prompt-vocab", "prompt: vocabulary init", _prompt(init="vocab")),
    # E2E's completions are sentences, not labels.
    Setting("prompt-labels", "prompt: answers as init", _prompt(init="labels"), only="lama"),
    Setting("prompt-random", "prompt: random init", _prompt(init="random")),
    Setting("prompt-ensemble", "prompt: ensemble of 5", _prompt(ensemble=5)),
    Setting("ptuning-mlp", "p-tuning: MLP, 5 before and 5 after the prompt", _ptuning("mlp")),
    Setting("ptuning-lstm", "p-tuning: LSTM", _ptuning("lstm")),
    Setting("ptuning-none", "p-tuning: no encoder", _ptuning("none")),
    Setting(
        "ptuning-front",
        "p-tuning: MLP, 10 before the prompt",
        _ptuning("mlp", "{p:10}{prompt}{completion}"),
    ),
    Setting(
        "ptuning-anchor",
        "p-tuning: no encoder, anchor 'Answer:'",
        _ptuning("none", "{p:5}{prompt}{p:5} Answer:{completion}"),
        only="lama",
    ),
)
BY_NAME = {setting.name: setting for setting in SETTINGS}

# Training settings that are the same in all cells, or change no result.
_NOT_COMPARED = {*SPEED_ONLY, "seed", "min_valid_tokens"}


@dataclass(frozen=True)
class Cell:
    """One measurement. With `asks`, test loss and answers to test questions are measured too."""

    task: str
    setting: Setting
    seed: int
    sizes: tasks.Sizes
    epochs: int
    learning_rate: float | None = None  # None: the task's, or the method's default
    asks: bool = True

    @property
    def name(self) -> str:
        rate = "" if self.learning_rate is None else f"@{self.learning_rate:g}"
        return f"{self.task}/{self.setting.name}{rate}/{self.seed}"

    @cached_property
    def train(self) -> ptuning.TrainConfig | None:
        method = self.setting.method
        if method is None:
            return None
        kind = TUNED_RATES.get((self.task, self.setting.swept), method.default_learning_rate)
        tuned = TUNED_RATES.get((self.task, self.setting.name), kind)
        return ptuning.TrainConfig(
            epochs=self.epochs,
            batch_size=8,
            learning_rate=self.learning_rate or tuned,
            patience=None,
            min_valid_tokens=0,
            seed=self.seed,
            pack_users=len(tasks.RELATIONS),
        )

    @cached_property
    def config(self) -> dict[str, Any]:
        """Everything that determines the result except the seed."""
        method, train = self.setting.method, self.train
        return self._measured | {
            "method": method.model_dump(mode="json") if method else None,
            "train": (train.model_dump(mode="json", exclude=_NOT_COMPARED) if train else None),
        }

    @property
    def _measured(self) -> dict[str, Any]:
        sizes = vars(self.sizes)
        if self.setting.method is None:  # the base model uses no train rows
            sizes = {**sizes, "train": 0}
        return {
            "version": VERSION,
            "backbone": BACKBONE,
            "task": self.task,
            "template": tasks.SPECS[self.task].template,
            "max_new_tokens": tasks.SPECS[self.task].max_new_tokens,
            "users": list(tasks.RELATIONS) if self.task == "lama" else ["e2e"],
            "rows": sizes,
            "asks": self.asks,
        }

    @cached_property
    def group(self) -> str:
        """The digest of what this file sets, except the seed. It excludes the library's defaults: a
        new field there must not make hours of measurements outdated. `is_done` compares the
        defaults."""
        given: list[dict[str, Any]] = [
            {} if part is None else part.model_dump(mode="json", exclude_unset=True)
            for part in (self.setting.method, self.train)
        ]
        given[1] = {name: value for name, value in given[1].items() if name not in _NOT_COMPARED}
        kind = self.setting.method.type if self.setting.method else None
        return training_digest(self._measured, kind, *given)

    @cached_property
    def digest(self) -> str:
        return training_digest(self.group, self.seed)

    def is_done(self, found: Sequence[Record]) -> bool:
        return any(
            record["digest"] == self.digest and records.agree(record, self.config)
            for record in found
        )


def make_grid(chosen: Sequence[str], seeds: int) -> Iterator[Cell]:
    """All cells, one seed after the other, so that early figures cover all settings."""
    for seed in range(seeds):
        for task in chosen:
            for setting in SETTINGS:
                # The base model does not depend on the seed: one cell.
                if setting.only in (None, task) and (setting.method or seed == 0):
                    yield Cell(task, setting, seed, tasks.SPECS[task].full, EPOCHS)


def make_quick_grid(chosen: Sequence[str]) -> Iterator[Cell]:
    for task in chosen:
        for name in QUICK:
            yield Cell(task, BY_NAME[name], 0, tasks.SPECS[task].quick, QUICK_EPOCHS)


def make_sweep(chosen: Sequence[str], names: Sequence[str]) -> Iterator[Cell]:
    """Every learning rate of the named settings: one seed, without test rows, which must not
    influence the choice."""
    for task in chosen:
        for setting in (BY_NAME[name] for name in names):
            if setting.method is None or setting.only not in (None, task):
                continue
            for rate in ENCODER_RATES if setting.encoder else RATES:
                sizes = tasks.SPECS[task].full
                yield Cell(task, setting, 0, sizes, EPOCHS, learning_rate=rate, asks=False)


@dataclass
class Bench:
    """What cells share: the models (one per template) and the tasks' rows, loaded on first use."""

    data: Path
    dtype: str
    threads: int
    fp32_kernels: bool = False
    _backbones: dict[str, ptuning.Backbone] = field(default_factory=dict)
    _pools: dict[str, tasks.Pool] = field(default_factory=dict)

    def load_backbone(self, task: str) -> ptuning.Backbone:
        template = tasks.SPECS[task].template
        if template not in self._backbones:
            loaded = ptuning.load_backbone(BACKBONE, dtype=self.dtype, template=template)
            if self.fp32_kernels:
                products.use_fp32_kernels(loaded.model)
            self._backbones[template] = loaded
            self.dtype = str(loaded.dtype).removeprefix("torch.")  # the same for all cells
        return self._backbones[template]

    def draw_rows(self, cell: Cell) -> tasks.Rows:
        if cell.task not in self._pools:
            self._pools[cell.task] = tasks.read_pool(cell.task, self.data)
        return tasks.draw_rows(self._pools[cell.task], cell.sizes, cell.seed)

    def measure(self, cell: Cell) -> Record:
        """Run one cell: train its users in one pack, score them, answer the test questions."""
        begin = time.monotonic()
        backbone, rows = self.load_backbone(cell.task), self.draw_rows(cell)
        start, start_cpu = time.monotonic(), time.process_time()
        trained, prefixes = train(backbone, cell, rows)
        seconds = {
            "train": time.monotonic() - start,
            # With one thread this hardly depends on the machine's other load.
            "train_cpu": time.process_time() - start_cpu,
        }
        failed = {result.user_key: result.error for result in trained if result.error}
        start = time.monotonic()
        loss: dict[str, float | None] = {"valid": None, "test": None}
        answered: dict[str, float] = {}
        if not failed:
            loss["valid"] = compute_mean_nll(backbone, select_valid_rows(rows), prefixes)
            if cell.asks:
                scored = {user: tasks.make_scored_rows(asked) for user, asked in rows.test.items()}
                loss["test"] = compute_mean_nll(backbone, scored, prefixes)
                answered = answer(backbone, cell, rows, prefixes)
        seconds["evaluate"] = time.monotonic() - start
        seconds["total"] = time.monotonic() - begin
        tokens = sum(result.tokens for result in trained)
        method = cell.setting.method
        return {
            "name": cell.name,
            "task": cell.task,
            "setting": cell.setting.name,
            "label": cell.setting.label,
            "seed": cell.seed,
            "loss": loss,
            **answered,
            **({"failed": failed} if failed else {}),
            "parameters": count_parameters(method, backbone.facts) if method else 0,
            "values_kept": count_values(method, backbone.facts) if method else 0,
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "tokens_trained": tokens,
            "tokens_per_second": round(tokens / seconds["train"], 1) if tokens else None,
            "resets": sum(result.resets for result in trained),
            "history": [result.history for result in trained],
            **cell.config,
            "fingerprint": backbone.fingerprint,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "machine": records.describe_machine(self.threads),
            **({"kernels": "float32"} if self.fp32_kernels else {}),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "ptuning": ptuning.__version__,
            },
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "group": cell.group,
            "digest": cell.digest,
        }


Prefixes = dict[str, ptuning.Prefix | None]


def train(
    backbone: ptuning.Backbone, cell: Cell, rows: tasks.Rows
) -> tuple[list[Trained], Prefixes]:
    """Train as `ptuning.tune` does, but also return the counts of tokens and resets, and choose the
    best epoch whatever the number of validation tokens."""
    method, config = cell.setting.method, cell.train
    if method is None or config is None:
        return [], dict.fromkeys(rows.examples)
    recipe = Recipe(method, config)
    examples = {user: arrange(given) for user, given in rows.examples.items()}
    ready = [
        encode_user(backbone.template, recipe, user_key(user), selected)
        for user, selected in examples.items()
    ]
    trained = LocalDriver(backbone).run(train_pack(backbone, method, config, ready))
    prefixes: Prefixes = {}
    for (user, selected), result in zip(examples.items(), trained, strict=True):
        meta = describe_prefix(backbone, recipe, user_key(user), data_digest(selected))
        prefixes[user] = make_prefix(result.members, meta) if result.members else None
    return trained, prefixes


def select_valid_rows(rows: tasks.Rows) -> dict[str, list[Example]]:
    return {
        user: [row for row in examples if row.split == "valid"]
        for user, examples in rows.examples.items()
    }


def compute_mean_nll(
    backbone: ptuning.Backbone, rows: dict[str, list[Example]], prefixes: Prefixes
) -> float:
    """Nats per completion token over all users' rows, each row with its user's prefix."""
    held = [prefix for prefix in prefixes.values() if prefix is not None]
    encoded = [[ptuning.encode(backbone, row) for row in examples] for examples in rows.values()]
    members = 1
    if held:
        arrangement = held[0].arrangement(backbone.template)
        encoded = [[arrangement.row(row) for row in user_rows] for user_rows in encoded]
        members = len(held[0].members)
    pack = pack_prefix(held, backbone) if held else None
    losses = LocalDriver(backbone).run(score_split(backbone, encoded, pack, 1024, members))
    nats = sum(sum(loss.nats) for loss in losses)
    return nats / sum(sum(loss.tokens) for loss in losses)


def answer(
    backbone: ptuning.Backbone, cell: Cell, rows: tasks.Rows, prefixes: Prefixes
) -> dict[str, float]:
    """Answer the test questions greedily, and return the scores."""
    spec = tasks.SPECS[cell.task]
    asked = [
        (prefixes[user], question)
        for user, questions in rows.test.items()
        for question in questions
    ]
    members = cell.setting.method.members if cell.setting.method else 1
    size = max(1, GENERATED_ROWS // members)
    given: list[str] = []
    for at in range(0, len(asked), size):
        part = asked[at : at + size]
        given += ptuning.generate(
            backbone,
            [question.prompt for _, question in part],
            [prefix for prefix, _ in part],
            max_new_tokens=spec.max_new_tokens,
        )
    scores = tasks.score_answers(spec.metric, given, [question.answers for _, question in asked])
    if spec.metric == "exact_match" and cell.setting.method is None:
        scores["commonest_match"] = round(tasks.compute_commonest_match(rows), 4)
    return scores


def count_parameters(method: Method, facts: Facts) -> int:
    """The number of trained parameters per user."""
    start = {name: torch.zeros(shape) for name, shape in method.shapes(facts).items()}
    initial = method.initial(facts, start if method.start_ids != "none" else None, seed=0)
    return method.members * sum(values.numel() for values in initial.trained.values())


def count_values(method: Method, facts: Facts) -> int:
    """The number of values in one user's prefix file."""
    sizes = [torch.Size(shape).numel() for shape in method.shapes(facts).values()]
    return method.members * sum(sizes)


def run(cells: Sequence[Cell], results: Results, bench: Bench) -> None:
    """Measure the cells that are not in the results file."""
    todo = [cell for cell in cells if not cell.is_done(results.records)]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them done", flush=True)
    # A progress bar on terminals only.
    bar = tqdm(todo, unit="cell", disable=None, file=sys.stdout)
    for at, cell in enumerate(bar):
        bar.set_description(cell.name)
        record = bench.measure(cell)
        results.append(record)
        rest = [(cell.task, cell.setting.name) for cell in todo[at + 1 :]]
        left = records.estimate_seconds_left(rest, results.records)
        about = "" if left is None or not rest else f"; {len(rest)} left, about {left / 60:.0f} min"
        bar.write(f"{records.format_cell(record)}{about}", file=sys.stdout)
        sys.stdout.flush()


def list_cells(cells: Sequence[Cell], found: Sequence[Record]) -> str:
    done = [cell.is_done(found) for cell in cells]
    lines = [f"{'done' if ok else '-':5s}{cell.name}" for cell, ok in zip(cells, done, strict=True)]
    return "\n".join([*lines, f"{sum(done)} of {len(cells)} done"])


def choose_cells(options: argparse.Namespace) -> list[Cell]:
    if options.learning_rates:
        cells = list(make_sweep(options.tasks, options.learning_rates))
    elif options.quick:
        cells = list(make_quick_grid(options.tasks))
    else:
        cells = list(make_grid(options.tasks, options.seeds))
    rows = {"train": options.train_rows, "valid": options.valid_rows}
    changed = {split: count for split, count in rows.items() if count}
    cells = [replace(cell, sizes=replace(cell.sizes, **changed)) for cell in cells]
    if options.epochs:
        cells = [replace(cell, epochs=options.epochs) for cell in cells]
    return [cell for cell in cells if re.search(options.only, cell.name)]


def choose_results_path(options: argparse.Namespace) -> Path:
    given: Path | None = options.results
    if given:
        return given
    if options.learning_rates:
        return RATES_RESULTS
    return QUICK_RESULTS if options.quick else RESULTS


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=tasks.find_data_folder(), help="folder of the data sets"
    )
    parser.add_argument("--results", type=Path, help="results file (JSON lines)")
    parser.add_argument("--tasks", nargs="+", choices=[*tasks.SPECS], default=[*tasks.SPECS])
    parser.add_argument("--only", default="", metavar="REGEX", help="only cells whose name matches")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-rows", type=int, help="train rows per user")
    parser.add_argument("--valid-rows", type=int, help="validation rows per user")
    parser.add_argument("--epochs", type=int, help="epochs per cell")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="the backbone's dtype; auto: that of the results file, or else measured",
    )
    parser.add_argument(
        "--fp32-kernels",
        action="store_true",
        help="compute a bf16 backbone's matrix products with fp32 kernels "
        "(infra/bench/products.py)",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="one seed of five settings, few rows")
    mode.add_argument(
        "--learning-rates",
        nargs="+",
        choices=[*BY_NAME],
        metavar="SETTING",
        help="sweep the learning rates of these",
    )
    parser.add_argument("--list", action="store_true", help="list the cells and stop")
    parser.add_argument("--table", action="store_true", help="print the results' tables and stop")
    parser.add_argument(
        "--overview", action="store_true", help="print one table with the tasks side by side"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the results and stop")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    path = choose_results_path(options)
    cells = choose_cells(options)
    if options.list or options.table or options.overview or options.plot:
        found, message = records.read_records(path)
        if message:
            print(message, file=sys.stderr)
        if options.list:
            print(list_cells(cells, found))
        if options.table:
            print(make_tables(options, found), end="")
        if options.overview:
            print(records.format_overview(put_grid_last(found), [*BY_NAME]), end="")
        if options.plot:
            records.plot(put_grid_last(found), options.plot)
        return 0
    if reason := tasks.explain_absence(options.data, options.tasks):
        print(f"skipped: {reason}")
        return 0
    torch.set_num_threads(options.threads)
    try:
        results = Results(path)
    except BlockingIOError:
        print(f"another process is writing to {path}", file=sys.stderr)
        return 1
    try:
        if results.message:
            print(results.message, flush=True)
        measured = results.records[-1]["dtype"] if results.records else "auto"
        dtype = measured if options.dtype == "auto" else options.dtype
        bench = Bench(options.data, dtype, options.threads, options.fp32_kernels)
        run(cells, results, bench)
        print(make_tables(options, results.records), end="")
    finally:
        results.close()
    return 0


def make_tables(options: argparse.Namespace, found: Sequence[Record]) -> str:
    if options.learning_rates:
        return records.format_rates(found)
    return records.format_tables(put_grid_last(found), [*BY_NAME])


def put_grid_last(found: Sequence[Record]) -> list[Record]:
    """The records, with those of the current grid at the end. Tables report the last records of a
    setting, and other values of the setting may have been measured since."""
    groups = {cell.group for cell in make_grid([*tasks.SPECS], seeds=1)}
    return sorted(found, key=lambda record: record["group"] in groups)


if __name__ == "__main__":
    sys.exit(main())
