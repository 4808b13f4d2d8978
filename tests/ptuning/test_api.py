"""The public interface as documented, and the errors when it is misused."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diverging import DivergingTraining
from safetensors.torch import load_file, save_file
from tiny_backbones import FAMILIES, REFUSED, as_layers, build, build_model
from tiny_model import make_tokenizer
from transformers import AutoModelForCausalLM

import ptuning
from ptuning.data.columns import ColumnNames
from ptuning.data.examples import DataConfig
from ptuning.errors import (
    BackboneChanged,
    BackboneError,
    ConfigError,
    DataError,
    ModelNotFound,
    OutOfMemory,
    PTuningError,
    TemplateError,
    UnsupportedModel,
    WrongBackbone,
)
from ptuning.model import load as load_module
from ptuning.model.backbone import Backbone
from ptuning.model.devices import choose_device
from ptuning.train.step import LocalDriver


def examples(word: str, count: int = 10) -> list[ptuning.Example]:
    return [
        ptuning.Example(prompt=f"question {n}", completion=f" {word} {n}", timestamp=n)
        for n in range(count)
    ]


def test_the_documented_lines_work(tiny_model_dir: Path, tmp_path: Path) -> None:
    backbone = ptuning.load_backbone(str(tiny_model_dir), dtype="float32")
    users = {"alice": examples("tea"), "bob": examples("coffee", 12), "carol": examples("milk", 3)}
    result = ptuning.tune(
        backbone,
        users,
        method=ptuning.PrefixTuning(num_virtual_tokens=4),
        train=ptuning.TrainConfig(epochs=2, batch_size=4),
    )
    assert list(result) == ["alice", "bob", "carol"]
    assert [result[user].status for user in users] == ["trained", "trained", "too_few"]
    assert result["carol"].prefix is None
    assert result["carol"].history == []

    history = result["alice"].history
    assert [line["epoch"] for line in history] == [1, 2]
    for line in history:
        assert type(line) is dict
        assert set(line) == {"epoch", "train", "valid"}
        assert all(isinstance(line[split], float) for split in ("train", "valid"))

    prefix = result["alice"].prefix
    assert prefix is not None
    path = tmp_path / "alice.safetensors"
    prefix.save(path)
    again = ptuning.Prefix.load(path, backbone)
    assert again.digest == prefix.digest
    assert len(prefix.digest) == 64
    assert prefix.meta.user_key == ptuning.user_key("alice")

    enc = ptuning.encode(backbone, users["alice"][0])
    assert type(enc.input_ids) is list
    assert type(enc.labels) is list
    assert len(enc.input_ids) == len(enc.labels)
    assert enc.labels[0] == -100
    assert enc.labels[-1] == enc.input_ids[-1]

    loss = ptuning.nll(backbone, users["alice"], prefix=prefix)
    assert math.isfinite(loss)
    assert loss == ptuning.nll(backbone, users["alice"], prefix=again)

    texts = ptuning.generate(
        backbone, ["question 1"] * 2, [prefix, None], max_new_tokens=4, temperature=0.0, seed=0
    )
    assert [type(text) for text in texts] == [str, str]

    ptuning.save_peft(prefix, tmp_path / "peft", backbone)
    assert ptuning.load_peft(tmp_path / "peft", backbone).digest == prefix.digest


def test_every_public_name_can_be_imported_repeatedly() -> None:
    """No module has the name of a public function, so no import can replace the function."""
    for name in ptuning.__all__:
        home = importlib.import_module(f"ptuning.{ptuning._HOMES[name]}")
        for _ in range(2):
            assert getattr(ptuning, name) is getattr(home, name)
            assert name in dir(ptuning)
        assert not isinstance(getattr(ptuning, name), ModuleType)
    import ptuning.tuning as module

    assert isinstance(module, ModuleType)
    assert module.tune is ptuning.tune
    with pytest.raises(AttributeError, match="nonsense"):
        ptuning.nonsense  # noqa: B018


def test_tuning_twice_gives_the_same_digests_whatever_the_order_of_users(
    backbone: Backbone,
) -> None:
    users = {"alice": examples("tea"), "bob": examples("coffee", 12)}
    options: dict[str, Any] = {
        "method": ptuning.PrefixTuning(num_virtual_tokens=3),
        "train": ptuning.TrainConfig(epochs=1, batch_size=4),
    }
    first = ptuning.tune(backbone, users, **options)
    again = ptuning.tune(backbone, users, **options)
    assert {u: r.prefix.digest for u, r in first.items() if r.prefix} == {
        u: r.prefix.digest for u, r in again.items() if r.prefix
    }
    other = ptuning.tune(backbone, dict(reversed(users.items())), **options)
    packs = ptuning.tune(
        backbone,
        {"alice": users["alice"]},
        method=options["method"],
        train=ptuning.TrainConfig(epochs=1, batch_size=4, pack_users=1, tokens_per_microbatch=30),
    )
    mine, reordered, alone = first["alice"].prefix, other["alice"].prefix, packs["alice"].prefix
    assert mine is not None
    assert reordered is not None
    assert alone is not None
    torch.testing.assert_close({**mine.tensors}, {**reordered.tensors}, atol=1e-4, rtol=0)
    torch.testing.assert_close({**mine.tensors}, {**alone.tensors}, atol=1e-4, rtol=0)
    # Settings of speed do not change a training's identity.
    assert mine.meta == reordered.meta == alone.meta


def test_the_training_digest_names_what_decides_a_prefix(backbone: Backbone) -> None:
    def meta(rows: list[ptuning.Example], user: str = "alice", **options: Any) -> Any:
        options = {
            "method": ptuning.PrefixTuning(num_virtual_tokens=2),
            "train": ptuning.TrainConfig(epochs=1),
            **options,
        }
        prefix = ptuning.tune(backbone, {user: rows}, **options)[user].prefix
        assert prefix is not None
        return prefix.meta

    base = meta(examples("tea"))
    assert meta(examples("tea")[::-1]) == base, "the order of reading has no effect"
    changed = [
        meta(examples("coffee")),
        meta(examples("tea"), user="bob"),
        meta(examples("tea"), train=ptuning.TrainConfig(epochs=2)),
        meta(examples("tea"), train=ptuning.TrainConfig(epochs=1, seed=1)),
        meta(examples("tea"), method=ptuning.PrefixTuning(num_virtual_tokens=3)),
        meta(examples("tea"), prefix_name="work"),
        meta(examples("tea"), artifact=ptuning.ArtifactConfig(dtype="bfloat16")),
        meta(examples("tea"), data=ptuning.DataConfig(max_length=64)),
    ]
    assert len({one.training_digest for one in [base, *changed]}) == len(changed) + 1
    assert changed[5].prefix_name == "work"


def test_one_users_bad_rows_fail_that_user_alone(backbone: Backbone) -> None:
    options: dict[str, Any] = {
        "method": ptuning.PrefixTuning(num_virtual_tokens=2),
        "train": ptuning.TrainConfig(epochs=1),
    }
    users = {
        "alice": examples("tea"),
        "empty": [ptuning.Example(prompt="a", completion="")] * 9,
        "neither": [ptuning.Example(prompt="a")] * 9,
        "long": [ptuning.Example(prompt="a", completion="word " * 400)] * 9,
        "broken": [ptuning.Example(prompt="\ud83d", completion="b")] * 9,
        "only-valid": [ptuning.Example(prompt="a", completion="b", split="valid")] * 9,
        "no-valid": [ptuning.Example(prompt="a", completion="b", split="train")] * 9,
        "nobody": [],
        "half\ud83d": examples("tea"),
    }
    result = ptuning.tune(backbone, users, **options)
    assert list(result) == list(users)
    assert result["alice"].status == "trained"
    for user in ("empty", "neither", "long", "broken", "only-valid", "half\ud83d"):
        assert result[user].status == "failed", user
        assert result[user].error
        assert result[user].prefix is None
    for user in ("no-valid", "nobody"):
        assert result[user].status == "too_few"
    alone = ptuning.tune(backbone, {"alice": users["alice"]}, **options)["alice"].prefix
    mine = result["alice"].prefix
    assert alone is not None
    assert mine is not None
    torch.testing.assert_close({**mine.tensors}, {**alone.tensors}, atol=1e-4, rtol=0)


def test_a_users_init_words_start_the_prefix(backbone: Backbone) -> None:
    rows = [
        ptuning.Example(
            prompt=f"q {n}", completion=" tea", init_words="earl grey" if n == 3 else None
        )
        for n in range(10)
    ]
    words = backbone.template.ids("earl grey")
    result = ptuning.tune(
        backbone,
        {
            "alice": [
                ptuning.Example(**{**vars(row), "split": "train" if n < 8 else "valid"})
                for n, row in enumerate(rows)
            ]
        },
        method=ptuning.PrefixTuning(num_virtual_tokens=len(words) + 2),
        train=ptuning.TrainConfig(epochs=1, learning_rate=1e-12),
    )["alice"]
    with torch.no_grad():
        captured, _ = backbone.capture(torch.tensor([[*words, *words[:2]]]))  # repeated to fill
    assert result.prefix is not None
    torch.testing.assert_close(
        as_layers(result.prefix.tensors), as_layers(captured)[0], atol=1e-6, rtol=0
    )


def test_weights_that_changed_during_training_are_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = build(FAMILIES["llama"]())
    token_nll = Backbone.token_nll

    def meddling(self: Backbone, *args: Any) -> Any:
        next(self.model.parameters()).data[0, 0] += 1e-3
        return token_nll(self, *args)

    monkeypatch.setattr(Backbone, "token_nll", meddling)
    with pytest.raises(BackboneChanged):
        ptuning.tune(
            backbone,
            {"alice": examples("tea")},
            method=ptuning.PrefixTuning(num_virtual_tokens=2),
            train=ptuning.TrainConfig(epochs=1),
        )


def test_the_base_models_nll_is_what_plain_transformers_computes(
    backbone: Backbone, tiny_model_dir: Path
) -> None:
    rows = examples("tea", 5)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tokenizer = make_tokenizer()
    nats, tokens = 0.0, 0
    for row in rows:
        prompt = [
            tokenizer.bos_token_id,
            *tokenizer(row.prompt, add_special_tokens=False)["input_ids"],
        ]
        answer = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([prompt + answer])).logits[0]
        log_probabilities = torch.log_softmax(logits.double(), dim=-1)
        for at, token in enumerate(answer, start=len(prompt)):
            nats -= float(log_probabilities[at - 1, token])
            tokens += 1
    assert ptuning.nll(backbone, rows) == pytest.approx(nats / tokens, rel=1e-5)
    for budget in (1, 30, 10_000):  # a mean over all tokens, not of the rows' means
        ours = ptuning.nll(backbone, rows, tokens_per_microbatch=budget)
        assert ours == pytest.approx(nats / tokens, rel=1e-5)


def test_a_trained_prefix_scores_what_its_history_says(backbone: Backbone) -> None:
    rows = [
        ptuning.Example(prompt=f"q {n}", completion=" tea", split="valid" if n < 3 else "train")
        for n in range(12)
    ]
    result = ptuning.tune(
        backbone,
        {"alice": rows},
        method=ptuning.PrefixTuning(num_virtual_tokens=3),
        train=ptuning.TrainConfig(epochs=4, batch_size=4),
    )["alice"]
    valid = [line["valid"] for line in result.history if line["valid"] is not None]
    assert ptuning.nll(backbone, rows[:3], result.prefix) == pytest.approx(min(valid), rel=1e-5)


def test_scoring_nothing_or_with_a_foreign_prefix_is_an_error(backbone: Backbone) -> None:
    with pytest.raises(DataError):
        ptuning.nll(backbone, [])
    other = build(FAMILIES["gpt2"]())
    prefix = ptuning.tune(
        other,
        {"a": examples("tea")},
        method=ptuning.PrefixTuning(num_virtual_tokens=2),
        train=ptuning.TrainConfig(epochs=1),
    )["a"].prefix
    with pytest.raises(WrongBackbone):
        ptuning.nll(backbone, examples("tea"), prefix)


def test_an_example_beyond_the_positions_is_not_scored() -> None:
    backbone = build(FAMILIES["gpt2"]())
    limit = backbone.facts.max_positions
    assert limit is not None
    row = ptuning.Example(prompt="q " * 2 * limit, completion=" tea")
    length = len(ptuning.encode(backbone, row, max_length=limit).input_ids)
    ptuning.nll(backbone, [row], max_length=limit)
    method = ptuning.PrefixTuning(num_virtual_tokens=limit - length + 1)
    small = ptuning.tune(
        backbone, {"a": examples("tea")}, method=method, train=ptuning.TrainConfig(epochs=1)
    )["a"].prefix
    for prefix, longest in ((small, limit), (None, limit + 1)):
        with pytest.raises(DataError, match="positions") as caught:
            ptuning.nll(backbone, [row], prefix, max_length=longest)
        assert (caught.value.seen, caught.value.expected) == (limit + 1, f"at most {limit}")


def test_a_result_counts_its_restarts(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    users = {"alice": examples("tea"), "bob": examples("coffee")}
    method = ptuning.PrefixTuning(num_virtual_tokens=3)
    train = ptuning.TrainConfig(epochs=3, batch_size=4)
    plain = ptuning.tune(backbone, users, method=method, train=train)
    DivergingTraining(monkeypatch, slot=1, times=1)
    blown = ptuning.tune(backbone, users, method=method, train=train)
    assert [(own.resets, own.status) for own in plain.values()] == [(0, "trained")] * 2
    assert [(own.resets, own.status) for own in blown.values()] == [(0, "trained"), (1, "trained")]
    for line, wanted in zip(blown["alice"].history, plain["alice"].history, strict=True):
        assert line == pytest.approx(wanted, abs=1e-5)


# Streams of users

QUICK: dict[str, Any] = {
    "method": ptuning.PrefixTuning(num_virtual_tokens=2),
    "train": ptuning.TrainConfig(epochs=1, pack_users=2),
}


def collect_results(
    results: Iterable[tuple[str, ptuning.TuneResult]], into: dict[str, ptuning.TuneResult]
) -> None:
    """Keep the results that are yielded before an error."""
    for user_id, result in results:
        into[user_id] = result


def test_users_are_read_a_pack_at_a_time_and_yielded_as_packs_finish(backbone: Backbone) -> None:
    """An endless stream gives results, and is read no further than necessary."""
    read = 0

    def forever() -> Iterator[tuple[str, list[ptuning.Example]]]:
        nonlocal read
        while True:
            read += 1
            yield f"user {read}", examples("tea") if read % 3 else []

    results = ptuning.iter_tune(backbone, forever(), **QUICK)
    for position, (user_id, result) in enumerate(islice(results, 6), 1):
        assert read - position < 2 * 2
        number = int(user_id.removeprefix("user "))
        assert result.status == ("trained" if number % 3 else "too_few")
    results.close()


def test_a_pack_that_raises_loses_no_result_that_was_yielded(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = {name: examples(name) for name in ("ann", "bob", "cy", "dan", "eve")}
    whole = ptuning.tune(backbone, users, **QUICK)
    found: dict[str, ptuning.TuneResult] = {}
    packs = 0
    run = LocalDriver.run

    def run_two(self: Any, machine: Any) -> Any:
        nonlocal packs
        packs += 1
        if packs == 2:
            raise OutOfMemory("no memory")
        return run(self, machine)

    monkeypatch.setattr(LocalDriver, "run", run_two)
    with pytest.raises(OutOfMemory):
        collect_results(ptuning.iter_tune(backbone, users, **QUICK), found)
    assert {user: one.require() for user, one in found.items()} == {
        user: whole[user].require() for user in ("ann", "bob")
    }


def test_rows_may_be_mappings_and_ids_numbers(backbone: Backbone) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": row.prompt, "completion": row.completion, "timestamp": row.timestamp}
        for row in examples("tea")
    ]
    asked = {"user_id": 7, "instruction": "never", "output": "learned", "weight": 0}
    given = ptuning.tune(backbone, {7: [*rows, asked]}, **QUICK)
    same = ptuning.tune(backbone, {"7": examples("tea")}, **QUICK)
    assert list(given) == ["7"]
    stamped = given["7"].require().meta
    assert stamped.user_key == ptuning.user_key("7")
    assert stamped.data_digest == same["7"].require().meta.data_digest
    wrong: dict[str, list[dict[str, object]]] = {
        "7": [*rows, {"prompt": "a"}],
        "8": [{**row, "user_id": 7} for row in rows],
    }
    bad = ptuning.tune(backbone, wrong, **QUICK)
    assert "completion is missing" in str(bad["7"].error)
    assert "a user other than" in str(bad["8"].error), "a row of user 7 must not train user 8"
    with pytest.raises(ConfigError, match="the same id"):
        ptuning.tune(backbone, {7: rows, "7": rows}, **QUICK)


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_users_may_be_a_table(backbone: Backbone, library: str) -> None:
    made = pytest.importorskip(library)
    make = made.table if library == "pyarrow" else made.DataFrame
    rows = [
        {"author": user, "prompt": row.prompt, "completion": row.completion, "split": row.split}
        for user in ("ann", "bob")
        for row in examples("tea" if user == "ann" else "rum")
    ]
    rows[0], rows[-1] = rows[-1], rows[0]  # users' rows need not be adjacent
    table = make({name: [row[name] for row in rows] for name in rows[0]})  # absent splits: None
    named = DataConfig(columns=ColumnNames(user_id="author"))
    found = ptuning.tune(backbone, table, data=named, **QUICK)
    assert list(found) == ["bob", "ann"]
    for user, said in (("ann", "tea"), ("bob", "rum")):
        mine = [row for row in rows if row["author"] == user]
        same = ptuning.tune(backbone, {user: mine}, **QUICK)[user].require()
        assert found[user].require().meta.data_digest == same.meta.data_digest, said
    some = make({"prompt": ["hi"] * 9, "completion": [f"so {n}" for n in range(9)]})
    (result,) = ptuning.tune(backbone, {"ann": some}, **QUICK).values()
    assert result.status == "trained"
    with pytest.raises(DataError, match=r"names the user.*prompt, completion"):
        ptuning.tune(backbone, some, **QUICK)
    ownerless = make({"user_id": ["ann", None], "prompt": ["a", "b"], "completion": ["c", "d"]})
    with pytest.raises(DataError, match=r"names no user.*row 1"):
        dict(ptuning.iter_tune(backbone, ownerless, **QUICK))


def test_the_salt_of_a_store_decides_whose_prefix_it_is(backbone: Backbone) -> None:
    users = {"ann": examples("tea")}
    salted = ptuning.tune(backbone, users, salt=b"a store's", **QUICK)["ann"].require()
    unsalted = ptuning.tune(backbone, users, **QUICK)["ann"].require()
    assert salted.meta.user_key == ptuning.user_key("ann", b"a store's")
    assert unsalted.meta.user_key == ptuning.user_key("ann") != salted.meta.user_key


def test_a_stream_names_at_its_end_users_of_start_who_never_came(
    backbone: Backbone,
) -> None:
    prefix = ptuning.tune(backbone, {"ann": examples("tea")}, **QUICK)["ann"].require()
    stream = iter([("ann", examples("tea"))])
    found: dict[str, ptuning.TuneResult] = {}
    begins = {"ann": prefix, "eve": prefix}
    with pytest.raises(ConfigError, match="not trained"):
        collect_results(ptuning.iter_tune(backbone, stream, start=begins, **QUICK), found)
    assert [*found] == ["ann"]


def test_a_result_is_printed_in_one_line_without_rows_or_tensors(backbone: Backbone) -> None:
    users = {
        "ann": examples("secret"),
        "bob": examples("secret", 2),
        "cy": [replace(row, init_words="") for row in examples("x" * 4000)],
    }
    results = ptuning.tune(
        backbone,
        users,
        method=QUICK["method"],
        train=ptuning.TrainConfig(epochs=1, keep_resume=True),
    )
    assert [one.status for one in results.values()] == ["trained", "too_few", "failed"]
    for one in results.values():
        assert "\n" not in repr(one)
        assert len(repr(one)) < 120
        assert "secret" not in repr(one)
    assert len(repr(results["ann"].resume)) < 80


def test_a_prefix_that_is_required_and_not_there_is_an_error_with_the_reason(
    backbone: Backbone,
) -> None:
    users = {"ann": examples("tea"), "bob": examples("tea", 2), "cy": examples("x" * 4000)}
    results = ptuning.tune(backbone, users, **QUICK)
    assert results["ann"].require() is results["ann"].prefix
    with pytest.raises(DataError, match="no prefix"):
        results["bob"].require()
    with pytest.raises(PTuningError) as caught:
        results["cy"].require()
    assert str(results["cy"].error) in str(caught.value.seen)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ptuning.TrainConfig(epochs=0), "train.epochs"),
        (lambda: ptuning.DataConfig(max_rows=1), "data.max_rows"),
        (lambda: ptuning.GateConfig(confidence=2.0), "gate.confidence"),
        (lambda: ptuning.BackboneConfig.model_validate({"dtype": "float12"}), "backbone.dtype"),
        (lambda: ptuning.ArtifactConfig.model_validate({"dtype": "int1"}), "artifact.dtype"),
        (lambda: ptuning.TrainConfig.model_validate({"epoch": 3}), "train.epoch"),
        (lambda: ptuning.PrefixTuning(num_virtual_tokens=0), "method.num_virtual_tokens"),
    ],
)
def test_an_invalid_setting_is_named_with_what_is_expected(
    make: Callable[[], object], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value.seen).startswith(named)
    assert caught.value.expected
    assert caught.value.fix


# Loading


@pytest.mark.parametrize(
    "name",
    ["no-such-model", "./nowhere", "/nowhere/at/all", "a/b/c", "", "model.gguf", "~/nothing"],
)
def test_a_name_of_no_model_is_model_not_found(name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        ptuning.load_backbone(name)
    assert caught.value.seen is not None


def test_a_hub_id_that_cannot_be_fetched_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_args: Any, **_kwargs: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelNotFound, match="no network") as caught:
        ptuning.load_backbone("owner/model")
    assert caught.value.fix


def _no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def _no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def _no_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


def _nonsense_config(directory: Path) -> None:
    (directory / "config.json").write_text("{nonsense")


def _no_model_type(directory: Path) -> None:
    (directory / "config.json").write_text("{}")


def _unknown_architecture(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "frobnicator"}')


def _cut_weights(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def _missing_weights(directory: Path) -> None:
    """Transformers would initialise the missing layer at random."""
    file = directory / "model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if "layers.1" not in name}
    save_file(kept, file, {"format": "pt"})


def _other_sizes(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))


def _an_encoder(directory: Path) -> None:
    build_model(REFUSED["bert"](), "eager").save_pretrained(directory)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (_no_config, ModelNotFound),
        (_no_weights, ModelNotFound),
        (_no_tokenizer, BackboneError),
        (_nonsense_config, ModelNotFound),
        (_no_model_type, UnsupportedModel),
        (_unknown_architecture, UnsupportedModel),
        (_cut_weights, ModelNotFound),
        (_missing_weights, UnsupportedModel),
        (_other_sizes, UnsupportedModel),
        (_an_encoder, UnsupportedModel),
    ],
)
def test_a_damaged_or_unusable_model_directory_is_a_backbone_error(
    tiny_model_dir: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    kind: type[BackboneError],
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(kind) as caught:
        ptuning.load_backbone(str(tmp_path / "model"), dtype="float32", device="cpu")
    assert caught.value.seen is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_this_machine_lacks_is_refused_where_it_is_used(tiny_model_dir: Path) -> None:
    """Only where it is used: a run's driver may lack the device of its workers."""
    assert choose_device("cuda:1").type == "cuda"
    with pytest.raises(ConfigError) as caught:
        ptuning.load_backbone(str(tiny_model_dir), device="cuda:1")
    assert "cuda:1" in str(caught.value.seen)
    assert caught.value.fix


@pytest.mark.parametrize(
    "options", [{"dtype": "float12"}, {"device": "warp-drive"}, {"attention": "flash"}]
)
def test_settings_that_do_not_exist_are_config_errors(
    tiny_model_dir: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        ptuning.load_backbone(str(tiny_model_dir), **options)
    assert caught.value.expected is not None


def test_a_chat_template_is_asked_for_where_there_is_none(tiny_model_dir: Path) -> None:
    with pytest.raises(TemplateError):
        ptuning.load_backbone(str(tiny_model_dir), dtype="float32", template="chat")


def test_a_model_larger_than_free_memory_is_refused_before_it_is_read(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "free_memory", lambda _device: 10_000)
    monkeypatch.setattr(load_module, "read_model", lambda *_a: pytest.fail("weights were read"))
    with pytest.raises(OutOfMemory) as caught:
        ptuning.load_backbone(str(tiny_model_dir), dtype="float32", device="cpu")
    assert "zero3" in (caught.value.fix or "")


def test_a_fingerprint_is_of_the_weights_whatever_the_dtype_and_the_directory(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "copy")
    loaded = [
        ptuning.load_backbone(str(path), dtype=dtype, device="cpu")
        for path, dtype in [
            (tiny_model_dir, "float32"),
            (tiny_model_dir, "bfloat16"),
            (tmp_path / "copy", "float32"),
        ]
    ]
    assert len({one.fingerprint for one in loaded}) == 1
    assert loaded[1].dtype == torch.bfloat16
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    assert ptuning.load_backbone(str(tmp_path / "copy")).fingerprint != loaded[0].fingerprint


def test_loaded_weights_are_frozen_and_dropout_is_off(backbone: Backbone) -> None:
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training
