"""A worker's processing of one pack, without Ray: a failure affects only its user."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diverging import DivergingTraining
from runs import user_rows
from tiny_backbones import FAMILIES, build

import pipelines.gangs.worker
from pipelines.candidates.judge import gate_all
from pipelines.done_record import DoneRecord
from pipelines.gangs.worker import PackJob, pack_machine
from pipelines.plan import Pack, PlannedUser
from ptuning.data.encode import IGNORE, Encoded
from ptuning.data.examples import arrange, data_digest
from ptuning.data.layout import Arrangement
from ptuning.gate import GateConfig, GateInput
from ptuning.identity import BackboneIdentity, Recipe, digest_training
from ptuning.methods.prefix import PrefixTuning
from ptuning.methods.prompt import PromptTuning
from ptuning.methods.ptuning import PTuning
from ptuning.model.backbone import Backbone
from ptuning.model.load import load_backbone
from ptuning.prefix.artifact import ArtifactConfig, Prefix
from ptuning.store import Store, prefix_path
from ptuning.store_identity import StoreIdentity
from ptuning.train.config import TrainConfig
from ptuning.train.step import LocalDriver, predicted
from ptuning.tuning import tune
from ptuning.types import Example, UserReport

USERS = ("ann", "bob", "cy")
KEYS = StoreIdentity("tests", b"the salt of a store")
user_key = KEYS.user_key


@pytest.fixture(scope="module")
def backbone(tiny_model_dir: Path) -> Backbone:
    torch.set_num_threads(1)
    return load_backbone(str(tiny_model_dir), dtype="float32")


def _examples(user: str, count: int = 12) -> list[Example]:
    rows = user_rows(user, count)
    return arrange([Example(**{k: v for k, v in r.items() if k != "user_id"}) for r in rows])


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Example]]:
    """The users' rows; a test may change them."""
    held = {user: _examples(user) for user in USERS}

    def read(_store: Any, _folder: str, keys: Sequence[str]) -> dict[str, list[Example]]:
        return {
            user_key(user): found for user, found in held.items() if user_key(user) in set(keys)
        }

    monkeypatch.setattr(pipelines.gangs.worker, "read_users", read)
    return held


def _recipe(tokens: int = 4, epochs: int = 2) -> Recipe:
    return Recipe(PrefixTuning(num_virtual_tokens=tokens), TrainConfig(epochs=epochs))


def _pack(
    backbone: Backbone, recipe: Recipe, rows: dict[str, list[Example]], **champion: Any
) -> Pack:
    users = []
    for user, examples in rows.items():
        data = data_digest(examples)
        key = user_key(user)
        users.append(
            PlannedUser(
                user_key=key,
                tokens=1,
                data_digest=data,
                training_digest=digest_training(recipe, BackboneIdentity.of(backbone), key, data),
                **(champion if user == "ann" else {}),
            )
        )
    return Pack(pack_id="p", users=tuple(users))


def _work(backbone: Backbone, tmp_path: Path, recipe: Recipe, pack: Pack) -> dict[str, UserReport]:
    job = PackJob(Store(tmp_path), "partition", recipe)
    reports = LocalDriver(backbone).run(pack_machine(backbone, job, pack))
    names = {user_key(user): user for user in USERS}
    return {names[report.user_key]: report for report in reports}


def test_every_user_of_a_pack_gets_a_file_and_losses_of_every_judge(
    backbone: Backbone, rows: dict[str, list[Example]], tmp_path: Path
) -> None:
    recipe = _recipe()
    reports = _work(backbone, tmp_path, recipe, _pack(backbone, recipe, rows))
    for user, report in reports.items():
        assert report.status == "trained"
        assert set(report.losses) == {"base", "candidate", "other"}
        path = tmp_path / prefix_path(user_key(user), str(report.digest))
        prefix = Prefix.load(path, backbone, user_key=user_key(user), digest=report.digest)
        assert prefix.meta.data_digest == data_digest(rows[user])


def test_a_user_whose_rows_cannot_be_encoded_fails_alone(
    backbone: Backbone, rows: dict[str, list[Example]], tmp_path: Path
) -> None:
    recipe = _recipe()
    pack = _pack(backbone, recipe, rows)
    whole = _work(backbone, tmp_path / "whole", recipe, pack)
    rows["bob"] = [Example(prompt="p", completion="x" * 5000, split="train")]
    reports = _work(backbone, tmp_path / "broken", recipe, pack)
    assert reports["bob"].status == "failed"
    assert reports["bob"].error
    for user in ("ann", "cy"):
        assert reports[user].status == "trained"
        assert reports[user].losses["candidate"]["valid"].nll == pytest.approx(
            whole[user].losses["candidate"]["valid"].nll, abs=1e-4
        )


@pytest.mark.parametrize("times", [1, 2])
def test_a_user_whose_training_diverges_is_reported_and_neighbours_are_unchanged(
    backbone: Backbone,
    rows: dict[str, list[Example]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
) -> None:
    recipe = _recipe()
    pack = _pack(backbone, recipe, rows)
    whole = _work(backbone, tmp_path / "whole", recipe, pack)
    assert not any("resets" in report.details for report in whole.values())
    DivergingTraining(monkeypatch, slot=[*rows].index("bob"), times=times)
    reports = _work(backbone, tmp_path / "blown", recipe, pack)
    assert reports["bob"].details["resets"] == 1
    assert reports["bob"].status == ("trained" if times == 1 else "failed")
    assert (reports["bob"].error is None) == (times == 1)
    for user in ("ann", "cy"):
        assert "resets" not in reports[user].details
        assert reports[user].losses["candidate"]["valid"].nll == pytest.approx(
            whole[user].losses["candidate"]["valid"].nll, abs=1e-4
        )


def test_a_prefix_that_its_dtype_cannot_hold_is_not_written(
    backbone: Backbone, rows: dict[str, list[Example]], tmp_path: Path
) -> None:
    settings = TrainConfig(epochs=1, learning_rate=1e6)
    recipe = Recipe(
        PrefixTuning(num_virtual_tokens=2), settings, artifact=ArtifactConfig(dtype="float16")
    )
    pack = _pack(backbone, recipe, rows)
    job = PackJob(Store(tmp_path), "partition", recipe)
    for report in LocalDriver(backbone).run(pack_machine(backbone, job, pack)):
        assert (report.status, report.stage, report.digest) == ("failed", "tune", None)
        assert "float16" in str(report.error)
        assert report.history, "the losses were finite"
    assert not list(tmp_path.rglob("*.safetensors"))


def test_rows_of_another_user_under_a_users_key_are_noticed(
    backbone: Backbone, rows: dict[str, list[Example]], tmp_path: Path
) -> None:
    recipe = _recipe()
    pack = _pack(backbone, recipe, rows)
    rows["ann"], rows["bob"] = rows["bob"], rows["ann"]
    reports = _work(backbone, tmp_path, recipe, pack)
    assert reports["ann"].status == reports["bob"].status == "failed"
    assert reports["cy"].status == "trained"
    assert not (tmp_path / "prefixes" / user_key("ann")[:2] / user_key("ann")).exists()


def test_a_champion_with_other_virtual_tokens_is_judged_on_the_same_rows(
    backbone: Backbone, rows: dict[str, list[Example]], tmp_path: Path
) -> None:
    first = _recipe(tokens=6, epochs=8)
    before = _work(backbone, tmp_path, first, _pack(backbone, first, rows))["ann"]
    recipe = _recipe(tokens=2, epochs=1)
    pack = _pack(
        backbone,
        recipe,
        rows,
        champion_digest=before.digest,
    )
    after = _work(backbone, tmp_path, recipe, pack)["ann"]
    assert after.losses["champion"]["valid"].nll == pytest.approx(
        before.losses["candidate"]["valid"].nll, abs=1e-4
    )
    gate_all([after], GateConfig(min_valid_tokens=0))
    assert after.decision == "rejected", "one epoch of two tokens must not beat eight of six"


def test_another_users_file_is_never_taken_for_the_champion(
    backbone: Backbone, rows: dict[str, list[Example]], tmp_path: Path
) -> None:
    """Someone copied it to the path of the user's own file."""
    recipe = _recipe()
    before = _work(backbone, tmp_path, recipe, _pack(backbone, recipe, rows))["bob"]
    digest, store = str(before.digest), Store(tmp_path)
    store.write(
        prefix_path(user_key("ann"), digest), store.read(prefix_path(user_key("bob"), digest))
    )
    pack = _pack(backbone, recipe, rows, champion_digest=digest)
    after = _work(backbone, tmp_path, recipe, pack)["ann"]
    assert "champion" not in after.losses
    assert "another user" in after.details["champion_ignored"]


def test_a_champion_of_another_method_is_judged_on_the_same_tokens(
    backbone: Backbone, rows: dict[str, list[Example]], tmp_path: Path
) -> None:
    first = _recipe()
    made = _work(backbone, tmp_path, first, _pack(backbone, first, rows))["ann"]
    champion = {
        "champion_digest": made.digest,
    }
    for method in (
        PromptTuning(num_virtual_tokens=4, ensemble=2, init="random"),
        PTuning(template="{prompt}{p:3} so {p:1}", encoder="none"),
    ):
        recipe = Recipe(method, TrainConfig(epochs=2))
        report = _work(backbone, tmp_path, recipe, _pack(backbone, recipe, rows, **champion))["ann"]
        assert report.status == "trained", report.error
        assert set(report.losses) == {"base", "champion", "candidate", "other"}
        assert len({report.losses[who]["valid"].tokens for who in report.losses}) == 1
        gate_all([report], GateConfig())
        assert report.gate is not None
        assert report.gate.gain_over_champion is not None


def test_a_row_without_a_prompt_counts_the_same_tokens_for_every_judge() -> None:
    """Only virtual tokens, of some methods, can come before its first token."""
    row = Encoded([5, 6, 7], [5, 6, 7])
    front = Arrangement(before=(-1, -2))
    inner = Arrangement(before=(-1,), after=(9, -2))
    assert predicted(row) == 2
    assert predicted(front.row(row)) == 3  # these are supervised in training
    for arrangement in (front, inner, Arrangement()):
        assert predicted(arrangement.judged_row(row)) == 2
    asked = Encoded([4, 5, 6], [IGNORE, 5, 6])
    assert all(predicted(arrangement.judged_row(asked)) == 2 for arrangement in (front, inner))


def test_test_rows_beyond_the_positions_are_left_out_for_every_judge(
    rows: dict[str, list[Example]], tmp_path: Path
) -> None:
    """With learned positions, a longer row would end the whole pack."""
    backbone = build(FAMILIES["gpt2"]())  # 128 positions
    long = Example(prompt="x" * 125, completion="y", split="test")
    short = Example(prompt="x", completion="y", split="test")
    rows["ann"] = [*rows["ann"], long, short]
    recipe = _recipe(tokens=8)
    reports = _work(backbone, tmp_path, recipe, _pack(backbone, recipe, rows))
    assert reports["ann"].status == "trained"
    assert reports["ann"].details["test_rows_too_long"] == 1
    assert all(len(reports["ann"].losses[who]["test"].tokens) == 1 for who in ("base", "candidate"))
    assert "test_rows_too_long" not in reports["bob"].details


def test_a_warm_start_that_is_impossible_is_named_in_the_gates_reason(
    backbone: Backbone, rows: dict[str, list[Example]], tmp_path: Path
) -> None:
    recipe = Recipe(PrefixTuning(num_virtual_tokens=4), TrainConfig(epochs=1, start="resume"))
    pack = _pack(backbone, recipe, rows, candidate_digest="0" * 64)
    report = _work(backbone, tmp_path, recipe, pack)["ann"]
    assert report.status == "trained"
    gate_all([report], GateConfig())
    assert report.gate is not None
    assert "trained from the start" in report.gate.reason


@pytest.mark.parametrize("start", ["init", "champion"])
def test_a_worker_trains_and_saves_what_the_library_does(
    backbone: Backbone, rows: dict[str, list[Example]], tmp_path: Path, start: Any
) -> None:
    """The file also names what the training started from, which the plan cannot know."""
    first = _recipe(epochs=1)
    before = _work(backbone, tmp_path, first, _pack(backbone, first, rows))["ann"]
    recipe = Recipe(first.method, TrainConfig(epochs=2, start=start))
    pack = _pack(backbone, recipe, rows, champion_digest=before.digest)
    after = _work(backbone, tmp_path, recipe, pack)["ann"]
    assert after.details.get("started_from") == (before.digest if start == "champion" else None)
    store = Store(tmp_path)
    champion, saved = (
        Prefix.from_bytes(store.read(prefix_path(user_key("ann"), str(report.digest))), backbone)
        for report in (before, after)
    )
    expected = tune(
        backbone,
        rows,
        method=recipe.method,
        train=TrainConfig(epochs=2),
        start={"ann": champion} if start == "champion" else {},
        salt=KEYS.salt,
    )["ann"].require()
    torch.testing.assert_close({**saved.tensors}, {**expected.tensors}, atol=1e-5, rtol=0)
    planned = pack.users[0].training_digest
    assert (saved.meta.training_digest == planned) == (start == "init")
    if start == "init":
        assert saved.meta == expected.meta


def test_a_worker_whose_backbone_has_another_dtype_than_was_planned_trains_nobody(
    backbone: Backbone, rows: dict[str, list[Example]], tmp_path: Path
) -> None:
    recipe = _recipe()
    pack = _pack(backbone, recipe, rows)
    wrong = replace(BackboneIdentity.of(backbone), dtype="bfloat16")
    users = [
        replace(
            user, training_digest=digest_training(recipe, wrong, user.user_key, user.data_digest)
        )
        for user in pack.users
    ]
    reports = _work(backbone, tmp_path, recipe, replace(pack, users=tuple(users)))
    assert {report.status for report in reports.values()} == {"failed"}
    assert "than what was planned" in str(reports["ann"].error)


def test_the_gate_decides_the_same_from_a_stored_record(
    backbone: Backbone, rows: dict[str, list[Example]], tmp_path: Path
) -> None:
    recipe = _recipe()
    reports = _work(backbone, tmp_path, recipe, _pack(backbone, recipe, rows))
    fresh = list(reports.values())
    record = DoneRecord(pack_id="p", attempt="a", seconds=0.0, champions={}, reports=tuple(fresh))
    stored = DoneRecord.from_json(json.loads(json.dumps(record.to_json()))).reports
    for one, again in zip(fresh, stored, strict=True):
        assert GateInput.of(again) == GateInput.of(one)
        assert one.counts["valid"]["rows"] == len(one.losses["base"]["valid"].tokens)
        assert one.counts["train"]["rows"] > 0
        assert one.counts["train"]["tokens"] > 0
    gate_all(fresh, GateConfig())
    gate_all(stored, GateConfig())
    assert [one.gate for one in stored] == [one.gate for one in fresh]
