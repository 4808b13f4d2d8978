"""The pure parts of the quality benchmark: rows, metrics, cells, the results file, its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ptuning
from infra.bench import methods, records, tasks
from infra.bench.products import use_fp32_kernels
from infra.bench.records import Results, format_tables, read_records
from ptuning.data.encode import IGNORE
from ptuning.model.facts import DECODER, Facts, StackFacts

FACTS = Facts(
    stacks={DECODER: StackFacts.of_one_shape(layers=30, heads=3, head_dim=64)},
    hidden_size=576,
    vocab_size=49152,
    max_positions=8192,
    takes_embeddings=True,
    decoder_start_id=None,
)


class FakeBench:
    """Measures nothing, and records the cells that it was given."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.measured: list[str] = []
        self.killed_at = killed_at

    def measure(self, cell: methods.Cell) -> dict[str, Any]:
        if len(self.measured) == self.killed_at:
            raise KeyboardInterrupt
        self.measured.append(cell.name)
        return record_of(cell)


def record_of(cell: methods.Cell, **changes: Any) -> dict[str, Any]:
    figures = {
        "name": cell.name,
        "task": cell.task,
        "setting": cell.setting.name,
        "label": cell.setting.label,
        "seed": cell.seed,
        "loss": {"valid": 1.5, "test": 2.0 + cell.seed},
        "bleu": 40.0,
        "parameters": 1000,
        "values_kept": 500,
        "seconds": {"train": 10.0, "train_cpu": 9.0, "evaluate": 2.0, "total": 12.0},
        "resets": 0,
        **cell.config,
        "dtype": "float32",
        "machine": {"cpu": "a cpu", "threads": 1},
        "versions": {"torch": "2"},
        "group": cell.group,
        "digest": cell.digest,
    }
    return figures | changes


def cell_of(name: str = "prefix", task: str = "e2e", seed: int = 0, **changes: Any) -> methods.Cell:
    setting = methods.BY_NAME[name]
    return methods.Cell(task, setting, seed, tasks.SPECS[task].full, methods.EPOCHS, **changes)


def run(path: Path, cells: list[methods.Cell], bench: FakeBench) -> None:
    results = Results(path)
    try:
        methods.run(cells, results, bench)  # type: ignore[arg-type]
    finally:
        results.close()


def test_bleu_takes_every_reference() -> None:
    references = [("the cat sat on the mat", "a cat sat there"), ("a dog ran far away",)]
    assert tasks.compute_bleu(
        ["a cat sat there", " a dog ran far away\n"], references
    ) == pytest.approx(100)
    first_only = [own[:1] for own in references]
    assert tasks.compute_bleu(["a cat sat there", "a dog ran far away"], first_only) < 99
    assert tasks.compute_bleu(["zzz", "yyy"], references) < 1


def test_exact_match_forgives_case_blanks_and_final_punctuation() -> None:
    references = [(" Germany",), (" English", " Pijin"), (" U.S.",)]
    assert tasks.compute_exact_match([" germany. ", "Pijin", "U.S"], references) == 1.0
    assert tasks.compute_exact_match(["in Germany", "Pijin!", ""], references) == pytest.approx(
        1 / 3
    )
    long_answers = ["Germany, a country", "French or English", ""]
    assert tasks.compute_first_word_match(long_answers, references) == pytest.approx(1 / 3)


def test_a_cloze_ends_before_its_object() -> None:
    assert tasks.make_cloze("The capital of [X] is [Y] .", "Kenya") == "The capital of Kenya is"
    with pytest.raises(ValueError, match="does not come last"):
        tasks.make_cloze("[X] plays [Y] music .", "Miles Davis")


def lama_table() -> list[dict[str, str]]:
    counts = {"train": 12, "valid": 3, "test": 4}
    return [
        {
            "relation": relation,
            "template": "[X] is located in [Y] .",
            "sub_label": f"{split} {n}",
            "obj_label": "Kenya" if n else "Peru",
            "split": split,
        }
        for relation in (*tasks.RELATIONS, "P999")
        for split, count in counts.items()
        for n in range(count)
    ]


def test_a_seed_draws_train_rows_and_nothing_else() -> None:
    pool = tasks.make_lama_pool(lama_table())
    assert set(pool) == set(tasks.RELATIONS)
    sizes = tasks.Sizes(train=6, valid=2, test=3)
    one, again, other = (tasks.draw_rows(pool, sizes, seed) for seed in (1, 1, 2))
    assert one == again
    assert one.test == other.test
    for user, examples in one.examples.items():
        by_split = [[e for e in examples if e.split == split] for split in ("train", "valid")]
        assert [len(own) for own in by_split] == [6, 2]
        assert by_split[1] == [e for e in other.examples[user] if e.split == "valid"]
        assert len({e.prompt for e in examples}) == len(examples)
        assert all((e.prompt or "").startswith(str(e.split)) for e in examples)
        assert by_split[0][0].completion in (" Kenya", " Peru")
    assert one.examples != other.examples
    assert 0.5 <= tasks.compute_commonest_match(one) <= 1.0
    with pytest.raises(ValueError, match="fewer than 13"):
        tasks.draw_rows(pool, tasks.Sizes(13, 2, 3), 0)


@pytest.mark.parametrize("name", ["base", "prefix", "prompt-ensemble", "ptuning-mlp"])
def test_a_cells_figures_equal_the_librarys(
    name: str, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The losses and answers of a cell on a tiny model equal those of the library, called user by
    user. No row, split or prefix of another user is mixed in."""
    monkeypatch.setattr(methods, "BACKBONE", str(tiny_model_dir))
    bench = methods.Bench(tmp_path, "float32", 1)
    bench._pools["lama"] = tasks.make_lama_pool(lama_table())
    cell = methods.Cell("lama", methods.BY_NAME[name], 1, tasks.Sizes(12, 3, 4), 1)
    record, backbone, rows = bench.measure(cell), bench.load_backbone("lama"), bench.draw_rows(cell)
    prefixes: dict[str, ptuning.Prefix | None] = dict.fromkeys(rows.examples)
    if cell.setting.method is not None:
        for user, examples in rows.examples.items():
            (alone,) = ptuning.tune(
                backbone,
                {user: examples},
                method=cell.setting.method,
                train=cell.train,
            ).values()
            prefixes[user] = alone.prefix
    assert record["parameters"] > 0 or name == "base"
    for split in ("valid", "test"):
        nats, tokens = 0.0, 0
        for user, prefix in prefixes.items():
            examples = [
                ptuning.Example(prompt=one.prompt, completion=one.answers[0])
                for one in rows.test[user]
            ]
            if split == "valid":
                examples = [one for one in rows.examples[user] if one.split == "valid"]
            own = sum(
                label != IGNORE
                for one in examples
                for label in ptuning.encode(backbone, one).labels
            )
            nats, tokens = nats + own * ptuning.nll(backbone, examples, prefix), tokens + own
        assert record["loss"][split] == pytest.approx(nats / tokens, rel=1e-4)
    given, right = [], []
    for user, prefix in prefixes.items():
        for one in rows.test[user]:
            given += ptuning.generate(backbone, [one.prompt], [prefix], max_new_tokens=8)
            right.append(one.answers)
    assert record["exact_match"] == pytest.approx(tasks.compute_exact_match(given, right), abs=1e-4)


def test_e2e_keeps_all_references_of_a_test_row() -> None:
    rows = [
        {"mr": f"name[{split} {n}]", "ref": f"It is {word} {n}.", "split": split}
        for split in ("train", "valid", "test")
        for n in range(3)
        for word in ("called", "named", "named")
    ]
    drawn = tasks.draw_rows(tasks.make_e2e_pool(rows), tasks.Sizes(3, 3, 3), 0)
    assert all(len(one.answers) == 2 for one in drawn.test["e2e"])
    (first,) = tasks.make_scored_rows(drawn.test["e2e"][:1])
    assert first.completion == drawn.test["e2e"][0].answers[0]


def test_the_grid_varies_one_thing_at_a_time() -> None:
    cells = list(methods.make_grid([*tasks.SPECS], seeds=3))
    assert len({cell.name for cell in cells}) == len({cell.digest for cell in cells}) == len(cells)
    assert len({cell.group for cell in cells}) == 20 + 22
    base = [cell for cell in cells if cell.setting.method is None]
    assert {cell.seed for cell in base} == {0}
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    for cell in cells:
        if cell.setting.method is not None:
            cell.setting.method.check(FACTS)
            varied = {"prefix-p1": 1, "prefix-p20": 20, "prompt-p20": 20}
            wanted = varied.get(cell.setting.name, 10)
            assert cell.setting.method.num_virtual_tokens == wanted


def test_parameters_are_counted_before_and_after_the_encoder() -> None:
    counted = {
        name: (methods.count_parameters(method, FACTS), methods.count_values(method, FACTS))
        for name, setting in methods.BY_NAME.items()
        if (method := setting.method) is not None
    }
    assert counted["prefix"] == (115_200, 115_200)
    assert counted["prefix-top"] == (38_400, 38_400)
    assert counted["prompt"] == (5_760, 5_760)
    assert counted["prompt-ensemble"] == (28_800, 28_800)
    mlp = 10 * 576 + 576 * 512 + 512 + 512 * 11_520 + 11_520
    assert counted["prefix-mlp"] == (mlp, 115_200)
    assert counted["ptuning-lstm"][0] > counted["ptuning-mlp"][0] > counted["ptuning-none"][0]


def test_a_digest_holds_settings_and_seed() -> None:
    assert cell_of().digest == cell_of().digest
    assert cell_of().group == cell_of(seed=1).group
    changed = [
        cell_of(seed=1),
        cell_of("prefix-p20"),
        cell_of(task="lama"),
        cell_of(learning_rate=0.5),
        cell_of(asks=False),
    ]
    assert len({one.digest for one in [cell_of(), *changed]}) == 6


def test_a_changed_default_makes_a_cell_new_and_a_new_field_does_not() -> None:
    cell = cell_of()
    record = record_of(cell)
    assert cell.is_done([json.loads(json.dumps(record))])
    older = {name: value for name, value in record["method"].items() if name != "sliding_window"}
    assert cell.is_done([record | {"method": older}])
    assert not cell.is_done([record | {"method": record["method"] | {"init": "random"}}])
    assert not cell.is_done([record | {"train": record["train"] | {"weight_decay": 0.1}}])
    assert not cell_of(seed=1).is_done([record])


def test_a_task_has_its_own_rate_where_a_sweep_found_one() -> None:
    def rate(name: str, task: str, **changes: Any) -> float | None:
        train = cell_of(name, task, **changes).train
        return None if train is None else train.learning_rate

    tuned = {
        name: rate(name, "lama")
        for name in methods.BY_NAME
        if name != "base" and rate(name, "lama") != rate(name, "e2e")
    }
    assert tuned == {
        **dict.fromkeys(("prefix", "prefix-p1", "prefix-p20"), 1e-2),
        "prefix-random": 2e-2,
    }
    assert rate("prefix-top", "lama") == rate("prefix-top", "e2e") == 3e-2  # swept separately
    assert rate("prefix", "e2e") == 3e-2
    assert rate("prefix", "lama", learning_rate=0.5) == 0.5
    assert rate("prefix-mlp", "lama") == 3e-4  # the method's default
    for _, name in methods.TUNED_RATES:
        assert methods.BY_NAME[name].swept == "prefix"


def test_a_sweep_tries_smaller_rates_for_encoders_and_no_test_rows() -> None:
    cells = list(methods.make_sweep(["e2e"], ["base", "prompt", "ptuning-lstm", "prompt-labels"]))
    rates = {
        name: [c.learning_rate for c in cells if c.setting.name == name]
        for name in ("prompt", "ptuning-lstm")
    }
    assert rates["prompt"] == [3e-3, 1e-2, 2e-2, 3e-2, 1e-1]
    assert rates["ptuning-lstm"] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert len(cells) == 10
    assert not any(cell.asks for cell in cells)
    found = [
        record_of(cell, loss={"valid": loss, "test": None}, resets=int(loss > 4))
        for cell, loss in zip(
            cells, (3.0, 2.0, 2.5, 2.7, 5.0, 9.0, 1.0, 2.0, 3.0, 4.0), strict=True
        )
    ]
    text = records.format_rates([*found, record_of(replace(cells[0], epochs=2))])
    assert "| e2e | prompt | 200 x 5 | 3.0000 | " in text.replace("|  ", "")
    assert "| e2e | prompt | 200 x 2 | " in text.replace("|  ", "")
    assert "| **2.0000** |" in text
    assert "5.0000 (restarted)" in text


def test_a_killed_run_loses_only_the_cell_in_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    cells = [cell_of(name) for name in methods.QUICK]
    with pytest.raises(KeyboardInterrupt):
        run(path, cells, FakeBench(killed_at=2))
    with path.open("a") as file:
        file.write(json.dumps(record_of(cells[2]))[:100])  # killed while writing
    found, message = read_records(path)
    assert [one["name"] for one in found] == [cell.name for cell in cells[:2]]
    assert message is not None
    assert "incomplete" in message
    bench = FakeBench()
    run(path, cells, bench)
    assert bench.measured == [cell.name for cell in cells[2:]]
    found, message = read_records(path)
    assert message is None
    assert [one["digest"] for one in found] == [cell.digest for cell in cells]
    assert methods.list_cells(cells, found).endswith("5 of 5 done")
    out = capsys.readouterr().out
    assert "5 cells, 2 of them done" in out
    assert "2 left, about 0 min" in out


def test_damage_elsewhere_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"a"\n{"b": 1}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_records(path)


def test_two_runs_do_not_share_a_results_file(tmp_path: Path) -> None:
    held = Results(tmp_path / "results.jsonl")
    with pytest.raises(BlockingIOError):
        Results(tmp_path / "results.jsonl")
    held.close()
    Results(tmp_path / "results.jsonl").close()


def test_time_left_is_guessed_from_the_setting_else_the_task() -> None:
    done = [
        record_of(cell_of("prefix"), seconds={"total": 10.0}),
        record_of(cell_of("prompt"), seconds={"total": 30.0}),
    ]
    assert records.estimate_seconds_left([("e2e", "prefix"), ("e2e", "ptuning-mlp")], done) == 30.0
    assert records.estimate_seconds_left([("lama", "prefix")], done) is None
    assert records.estimate_seconds_left([], done) == 0


def test_the_table_has_means_over_the_newest_settings_seeds() -> None:
    old = cell_of(learning_rate=0.5)
    slower = {"train": 99.0, "train_cpu": 98.0, "evaluate": 2.0, "total": 101.0}
    found = [
        record_of(old, loss={"valid": 9.0, "test": 9.0}),
        *(record_of(cell_of(seed=seed), bleu=40.0 + seed) for seed in range(2)),
        record_of(cell_of(seed=2), bleu=42.0, kernels="float32", seconds=slower),
        record_of(
            cell_of("prompt"),
            failed={"key": "diverged"},
            bleu=None,
            loss={"valid": None, "test": None},
        ),
        record_of(cell_of("base"), method=None, train=None, parameters=0),
    ]
    for one in [record_of(cell_of(task="lama"), exact_match=0.45, first_word_match=0.5)]:
        del one["bleu"]
        found.append(one)
    text = format_tables(found, [*methods.BY_NAME])
    e2e, lama = text.split("### LAMA")
    assert (
        "| prefix: 10 virtual tokens, direct, words | 3 | 0.03 | 1,000 | 500 | 3.000 ± 1.000 |"
        in e2e
    )
    assert "| 41.0 ± 1.0 | 10 | 9 |" in e2e
    assert "9.000" not in e2e
    assert e2e.index("base model") < e2e.index("prefix: 10")
    assert "| prompt: 10 virtual tokens, text init | 1 | 0.03 | 1,000 | 500 | - | - |" in e2e
    assert "| 45.0 | 50.0 |" in lama
    assert (
        "a cpu, 1 thread, float32 by fp32 kernels, torch 2; a cpu, 1 thread, float32, torch" in text
    )
    assert format_tables([]) == "No results.\n"


def test_the_overview_has_the_tasks_side_by_side() -> None:
    found = [
        *(record_of(cell_of(seed=seed), bleu=40.0 + seed) for seed in range(3)),
        record_of(cell_of(task="lama"), exact_match=0.45),
        record_of(cell_of("prompt-labels", task="lama"), exact_match=0.5),
    ]
    for one in found[3:]:
        del one["bleu"]
    head, _, both, one_task = records.format_overview(found, [*methods.BY_NAME]).splitlines()
    assert head.startswith("| setting | parameters per user | E2E loss | BLEU | LAMA loss | exact")
    assert "| 41.0 ± 1.0 |" in both
    assert "| 45.0 | 0.03 / 0.01 | 3 / 1 |" in both
    assert "| - | - |" in one_task
    assert "| 50.0 | - / 0.03 | 0 / 1 |" in one_task


def test_the_benchmark_page_has_the_results_files_table() -> None:
    readme = (Path(__file__).parents[1] / "infra/docs/benchmarks.md").read_text(encoding="utf-8")
    shown = readme.split("<!-- methods -->\n")[1].split("<!-- /methods -->")[0]
    found, message = records.read_records(methods.RESULTS)
    assert message is None
    found = methods.put_grid_last(found)
    assert shown == records.format_overview(found, [*methods.BY_NAME]), "see --overview"


def test_tables_report_the_grids_cells_though_others_were_measured_since(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    other = record_of(cell_of(learning_rate=0.5), bleu=99.0)
    path.write_text("".join(json.dumps(one) + "\n" for one in (record_of(cell_of()), other)))
    for shown in ("--table", "--overview"):
        assert methods.main(["--results", str(path), shown]) == 0
        out = capsys.readouterr().out
        assert "40.0" in out
        assert "99.0" not in out


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    found = [
        record_of(cell_of("base"), method=None),
        record_of(cell_of()),
        record_of(cell_of(task="lama")),
    ]
    records.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_data_it_is_skipped_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(tmp_path), "--results", str(tmp_path / "r.jsonl")]
    assert methods.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("skipped: no e2e.parquet, lama-trex.parquet in ")
    assert "PTUNING_SHARED_DATA" in out
    assert not (tmp_path / "r.jsonl").exists()


def test_cells_are_listed_without_data_or_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(record_of(cell_of())) + "\n")
    arguments = ["--results", str(path), "--list", "--only", "^e2e/prefix/", "--table"]
    assert methods.main(arguments) == 0
    out = capsys.readouterr().out
    assert "done e2e/prefix/0" in out
    assert "1 of 3 done" in out
    assert "### E2E" in out


def test_fp32_kernels_change_a_bf16_models_values_by_a_rounding_at_most() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 160, bias=False), nn.SiLU(), nn.Linear(160, 48, bias=False))
    model.to(torch.bfloat16).requires_grad_(False)
    found = []
    for _ in range(2):
        x = torch.linspace(-2, 2, 7 * 96).view(7, 96).bfloat16().requires_grad_()
        y = model(x)
        y.backward(torch.linspace(-1, 1, 7 * 48).view(7, 48).bfloat16())
        found.append((y.detach(), x.grad))
        use_fp32_kernels(model)
    for own, other in zip(*found, strict=True):
        assert own is not None
        assert other is not None
        assert own.dtype == other.dtype == torch.bfloat16
        torch.testing.assert_close(own, other, rtol=2**-6, atol=2**-7)
        assert (own == other).float().mean() > 0.8
