"""Measure what a run costs besides training: partition, plan, gang start, registration.

    python -m infra.bench.overhead [--users 200 2000] [--repeats 1]

Runs `ptuning run` with two numbers of users on a tiny random backbone that takes almost no time
to train. Prints each stage's fixed cost in seconds and its cost in seconds per 1,000 users.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

STAGES = ("start", "partition", "plan", "tune", "evaluate", "register", "deploy", "total")


def make_model(folder: Path) -> None:
    """Save a random Llama of one layer with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=259,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a"], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(wrapped),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    ).save_pretrained(folder)
    wrapped.save_pretrained(folder)


def make_rows(path: Path, users: int) -> None:
    """Write ten short rows per user, interleaved."""
    picker = random.Random(0)
    with path.open("w") as file:
        for n in range(10):
            for user in range(users):
                row = {
                    "user_id": f"user{user}",
                    "prompt": f"say {picker.randrange(100)}",
                    "completion": picker.choice(("yes", "no")),
                    "timestamp": n,
                }
                file.write(json.dumps(row) + "\n")


def run_once(folder: Path, users: int, pack_users: int) -> dict[str, float]:
    store = folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    command = [sys.executable, "-m", "pipelines", "run", "--data", str(folder / f"{users}.jsonl")]
    command += ["--store", str(store), "--model", str(folder / "model")]
    for setting in (
        "backbone.dtype=float32",
        "method.num_virtual_tokens=1",
        "train.epochs=1",
        "gate.min_gain=-100",
        f"train.pack_users={pack_users}",
    ):
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (path,) = store.glob("runs/*/summary.json")
    seconds: dict[str, float] = json.loads(path.read_text())["seconds"]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, nargs=2, default=(200, 2000))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--pack-users", type=int, default=64)
    options = parser.parse_args()
    few, many = options.users
    figures: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        for users in (few, many):
            make_rows(folder / f"{users}.jsonl", users)
            runs = [run_once(folder, users, options.pack_users) for _ in range(options.repeats)]
            figures[users] = {stage: median(run[stage] for run in runs) for stage in STAGES}
    print(f"{'stage':10s} {few:>8d} {many:>8d}   fixed s   s per 1,000 users")
    for stage in STAGES:
        low, high = figures[few][stage], figures[many][stage]
        slope = (high - low) / (many - few)
        print(f"{stage:10s} {low:8.1f} {high:8.1f} {low - slope * few:9.1f} {1000 * slope:9.1f}")


if __name__ == "__main__":
    main()
