"""The packed trainer equals the plain one for each user, whoever the neighbours are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diverging import DivergingTraining
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from method_catalogue import CATALOGUE, P, select_for_causal_models
from tiny_backbones import (
    FAMILIES,
    as_groups,
    as_layers,
    build,
    build_model,
    kv_shape,
    random_ids,
    random_kv,
    random_row,
    user_rows,
)
from tiny_model import make_tokenizer
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from ptuning.data.encode import IGNORE, Encoded
from ptuning.data.packing import epoch_batches, fill_words, microbatches
from ptuning.errors import (
    BackboneChanged,
    CorruptArtifact,
    MethodError,
    WrongBackbone,
    WrongMethod,
    WrongUser,
)
from ptuning.methods.base import Method, Parameters
from ptuning.methods.prefix import PrefixTuning
from ptuning.methods.prompt import PromptTuning
from ptuning.model.attention import implementation
from ptuning.model.backbone import Backbone
from ptuning.model.batch import PackPrefix
from ptuning.scoring import score_split
from ptuning.train.config import (
    EQUAL_LOSS,
    BestEpoch,
    TrainConfig,
    Trained,
    UserRows,
    learning_rate_at,
)
from ptuning.train.packed import train_pack
from ptuning.train.plain import train_user
from ptuning.train.resume import Belongs, Resume
from ptuning.train.slots import Slots
from ptuning.train.step import LocalDriver, Machine, Train, collate
from ptuning.types import seed_of


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """With weights large enough that prefixes matter."""
    return build(FAMILIES["llama"]())


METHODS: dict[str, Any] = {name: entry.method for name, entry in select_for_causal_models().items()}
FAST = [entry.method for entry in select_for_causal_models().values() if entry.fast]
# A selection without the slow tests, all methods with them.
methods = pytest.mark.parametrize(
    "method",
    [
        pytest.param(entry.method, id=name, marks=() if entry.fast else pytest.mark.slow)
        for name, entry in select_for_causal_models().items()
    ],
)


def users() -> list[UserRows]:
    """Users with many rows, one row, no validation rows, and more batches than the others."""
    return [
        user_rows("alice", train=7, valid=3, init_ids=P),
        user_rows("bob", train=1, valid=1, init_ids=P),
        user_rows("carol", train=4, valid=0, init_ids=P),
        user_rows("dave", train=11, valid=2, init_ids=P, longest=30),
        user_rows("erin", train=3, valid=5, init_ids=P),
    ]


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **{"epochs": 3, "batch_size": 3, "patience": None, "min_valid_tokens": 0, **changes}
    )


def train_packed(
    backbone: Backbone, method: Method, settings: TrainConfig, pack: Sequence[UserRows]
) -> dict[str, Trained]:
    results = LocalDriver(backbone).run(train_pack(backbone, method, settings, pack))
    assert [one.user_key for one in results] == [user.user_key for user in pack]
    return {one.user_key: one for one in results}


def assert_same(ours: Trained, expected: Trained, atol: float = 1e-4) -> None:
    assert ours.error is None
    assert expected.error is None
    assert ours.members is not None
    assert expected.members is not None
    for mine, theirs in zip(ours.members, expected.members, strict=True):
        assert mine.keys() == theirs.keys()
        for stack, kv in theirs.items():
            torch.testing.assert_close(mine[stack], kv, atol=atol, rtol=0)
    assert (ours.steps, ours.tokens) == (expected.steps, expected.tokens)
    assert [line["epoch"] for line in ours.history] == [line["epoch"] for line in expected.history]
    for line, wanted in zip(ours.history, expected.history, strict=True):
        for split in ("train", "valid"):
            assert line[split] == (
                None if wanted[split] is None else pytest.approx(wanted[split], abs=atol)
            )


@methods
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.1, "max_grad_norm": None, "schedule": "constant"},
        {"max_grad_norm": 0.05, "warmup_fraction": 0.4, "batch_size": 2, "epochs": 4},
        {"batch_size": 100, "tokens_per_microbatch": 1},
        {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 0.1},
    ],
    ids=["defaults", "decay", "clipped-warmup", "one-row-microbatches", "adam"],
)
def test_a_pack_gives_what_each_user_alone_gives_in_the_plain_trainer(
    backbone: Backbone, method: PrefixTuning, changes: dict[str, Any]
) -> None:
    settings = config(**changes)
    results = train_packed(backbone, method, settings, users())
    for user in users():
        expected = train_user(backbone, method, settings, user)
        assert_same(results[user.user_key], expected)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_packed_equals_plain_on_other_families(family: str, kind: str) -> None:
    backbone, method = build(FAMILIES[family](), kind), METHODS["direct-words"]
    # Adam divides by the size of a gradient: a tiny gradient is mostly rounding.
    settings = config(epochs=2, learning_rate=1e-2)
    results = train_packed(backbone, method, settings, users()[:3])
    for user in users()[:3]:
        assert_same(results[user.user_key], train_user(backbone, method, settings, user), atol=5e-4)


@methods
def test_a_users_prefix_does_not_depend_on_neighbours_order_or_microbatches(
    backbone: Backbone, method: PrefixTuning
) -> None:
    pack = users()
    alone = {user.user_key: train_packed(backbone, method, config(), [user]) for user in pack}
    variants = [
        train_packed(backbone, method, config(), pack),
        train_packed(backbone, method, config(), pack[::-1]),
        train_packed(backbone, method, config(tokens_per_microbatch=40), pack[1:] + pack[:1]),
        train_packed(backbone, method, config(pack_users=1), pack[:3]),
    ]
    for variant in variants:
        for key, trained in variant.items():
            assert_same(trained, alone[key][key])


def test_the_same_rows_and_seed_in_two_slots_of_a_pack_give_the_same_prefix(
    backbone: Backbone,
) -> None:
    alice = users()[0]
    twin = replace(alice, user_key="twin")
    results = train_packed(backbone, METHODS["direct-words"], config(), [alice, twin])
    one, two = results["alice"].kv, results["twin"].kv
    assert one is not None
    assert two is not None
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_gradient_checkpointing_trains_the_same_prefix() -> None:
    results = [
        train_packed(
            build(FAMILIES["llama"](), gradient_checkpointing=checkpointed),
            METHODS["mlp-words"],
            config(),
            users()[:2],
        )
        for checkpointed in (False, True)
    ]
    for key in results[0]:
        assert_same(results[1][key], results[0][key], atol=1e-5)


@methods
def test_a_bfloat16_backbone_trains_fp32_prefixes_close_to_the_plain_trainers(method: Any) -> None:
    model = build_model(FAMILIES["llama"](), implementation("eager")).to(torch.bfloat16)
    backbone = Backbone(model, make_tokenizer(), name="tiny", fingerprint="0" * 64)
    settings = config(epochs=2, keep_resume=True)
    results = train_packed(backbone, method, settings, users()[:3])
    for user in users()[:3]:
        ours, plain = results[user.user_key], train_user(backbone, method, settings, user)
        assert ours.members is not None
        assert plain.members is not None
        for state in ours.states:
            for tensors in (state.trained, state.first, state.second, state.best):
                assert all(values.dtype == torch.float32 for values in tensors.values())
        for line, wanted in zip(ours.history, plain.history, strict=True):
            assert line["train"] == pytest.approx(wanted["train"], abs=0.02)
        # Adam moves a value by at most the learning rate per step, whatever the rounding. The few
        # values whose gradient changes sign by rounding hardly affect the mean.
        limit = 0.05 * method.default_learning_rate
        for own, other in zip(ours.members, plain.members, strict=True):
            for name, values in other.items():
                assert own[name].dtype == torch.float32
                assert (own[name] - values).abs().mean() < limit


def test_members_of_an_ensemble_are_separate_trainings(backbone: Backbone) -> None:
    """Each equals the training of a user with its seed, and no two are equal."""
    alice, method = users()[0], METHODS["prompt-ensemble"]
    members = train_packed(backbone, method, config(), [alice])["alice"].members
    assert members is not None
    for number, member in enumerate(members):
        single = replace(alice, seed=seed_of(alice.seed, "member", number))
        one = PromptTuning(num_virtual_tokens=P, init="random")
        alone = train_user(backbone, one, config(), single).members
        assert alone is not None
        torch.testing.assert_close(member["embeddings"], alone[0]["embeddings"], atol=1e-4, rtol=0)
        for other in members[:number]:
            assert (member["embeddings"] - other["embeddings"]).abs().mean() > 0.1


def test_dropout_acts_in_training_only(backbone: Backbone) -> None:
    alice = users()[0]
    with_it, without = METHODS["dropout"], METHODS["direct-words"]
    dropped, whole = (
        train_packed(backbone, method, config(), [alice])["alice"] for method in (with_it, without)
    )
    assert dropped.kv is not None
    assert whole.kv is not None
    assert (as_layers(dropped.kv) - as_layers(whole.kv)).abs().max() > 1e-3
    # Validation after the first epoch, of a prefix that has hardly moved: nothing is dropped.
    still = config(epochs=1, learning_rate=1e-12)
    ours, plain = (
        train_packed(backbone, m, still, [alice])["alice"].history[0] for m in (with_it, without)
    )
    assert ours["valid"] == pytest.approx(plain["valid"], abs=1e-6)
    assert ours["train"] != pytest.approx(plain["train"], abs=1e-4)


@methods
def test_training_lowers_the_loss_on_a_task_that_can_be_learned(
    backbone: Backbone, method: PrefixTuning
) -> None:
    """All completions of a user are the same token."""

    def rows(answer: int) -> tuple[Encoded, ...]:
        prompts = [random_ids(5, seed) for seed in range(6)]
        return tuple(
            Encoded([*ids, answer, answer], [IGNORE] * 5 + [answer] * 2) for ids in prompts
        )

    pack = [
        UserRows(
            user_key=f"says-{answer}",
            seed=answer,
            train=rows(answer),
            valid=rows(answer)[:2],
            init_ids=(answer,) * P,
        )
        for answer in (50, 120, 260)
    ]
    entry = next(entry for entry in CATALOGUE.values() if entry.method == method)
    settings = config(epochs=15, learning_rate=entry.rate)
    results = train_packed(backbone, method, settings, pack)
    for trained in results.values():
        first, last = trained.history[0]["train"], trained.history[-1]["train"]
        assert first is not None
        assert last is not None
        assert last < first - entry.gain, trained.history


def test_the_best_epoch_is_kept_and_users_stop_at_epochs_of_their_own(backbone: Backbone) -> None:
    """One user's validation contradicts the training: that user stops early, others do not."""

    def rows(answer: int, count: int) -> tuple[Encoded, ...]:
        return tuple(
            Encoded([*random_ids(4, n), answer, answer], [IGNORE] * 4 + [answer] * 2)
            for n in range(count)
        )

    contrary = UserRows(
        user_key="contrary", seed=1, train=rows(50, 4), valid=rows(120, 2), init_ids=(9, 8, 7)
    )
    steady = UserRows(
        user_key="steady", seed=2, train=rows(60, 4), valid=rows(60, 2), init_ids=(9, 8, 7)
    )
    settings = config(epochs=8, patience=1, learning_rate=0.2, batch_size=2)
    method = METHODS["direct-words"]
    results = train_packed(backbone, method, settings, [contrary, steady, *users()[:2]])
    assert len(results["contrary"].history) < len(results["steady"].history)
    for user in (contrary, steady, *users()[:2]):
        assert_same(results[user.user_key], train_user(backbone, method, settings, user))
    # The best epoch's prefix is kept, not the last one's.
    valid = [line["valid"] or math.inf for line in results["contrary"].history]
    best = valid.index(min(valid))
    assert best < len(valid) - 1
    # With a constant rate, a shorter training is the beginning of a longer one.
    shorter = config(
        epochs=best + 1, learning_rate=0.2, batch_size=2, schedule="constant", patience=None
    )
    longer = shorter.model_copy(update={"epochs": 8, "patience": 1})
    kept = train_packed(backbone, method, longer, [contrary])["contrary"].kv
    last = train_packed(backbone, method, shorter, [contrary])["contrary"]
    assert kept is not None
    assert last.kv is not None
    torch.testing.assert_close(kept, last.kv, atol=1e-5, rtol=0)


@pytest.mark.parametrize("trainer", ["packed", "plain"])
def test_an_epoch_is_chosen_only_where_there_are_validation_tokens_enough(
    backbone: Backbone, trainer: str
) -> None:
    """With fewer than train.min_valid_tokens, all epochs are trained and the last one is kept."""

    def rows(answer: int, count: int) -> tuple[Encoded, ...]:
        return tuple(
            Encoded([*random_ids(4, n), answer, answer], [IGNORE] * 4 + [answer] * 2)
            for n in range(count)
        )

    user = UserRows(
        user_key="contrary", seed=1, train=rows(50, 4), valid=rows(120, 2), init_ids=(9, 8, 7)
    )
    method = METHODS["direct-words"]

    def trained(user: UserRows, enough: int) -> Trained:
        settings = config(
            epochs=6, patience=1, learning_rate=0.2, batch_size=2, min_valid_tokens=enough
        )
        if trainer == "plain":
            return train_user(backbone, method, settings, user)
        return train_packed(backbone, method, settings, [user, *users()[:1]])[user.user_key]

    chosen, last, blind = trained(user, 4), trained(user, 5), trained(replace(user, valid=()), 0)
    assert (len(chosen.history), len(last.history)) != (6, 6)
    assert len(last.history) == len(blind.history) == 6
    assert last.kv is not None
    assert blind.kv is not None
    assert chosen.kv is not None
    torch.testing.assert_close(last.kv, blind.kv, atol=1e-5, rtol=0)
    assert not torch.allclose(as_layers(chosen.kv), as_layers(last.kv), atol=1e-3)


@pytest.mark.parametrize("budget", [20, 10_000])
def test_a_packs_gradient_is_that_of_each_users_mean_loss(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """AdamW ignores a constant factor of the gradient, so trained prefixes would not show it."""
    method, pack = METHODS["direct-words"], users()
    steps: list[dict[str, Tensor]] = []
    starts: list[dict[str, Tensor]] = []
    update = Slots.update

    def watch(slots: Slots, leaves: PackPrefix, *args: Any) -> None:
        starts.append({name: leaf.detach().clone() for name, leaf in leaves.tensors.items()})
        steps.append(
            {
                name: leaf.grad.clone()
                for name, leaf in leaves.tensors.items()
                if leaf.grad is not None
            }
        )
        update(slots, leaves, *args)

    monkeypatch.setattr(Slots, "update", watch)
    train_packed(
        backbone, method, config(epochs=1, batch_size=100, tokens_per_microbatch=budget), pack
    )
    (gradients,), (start,) = steps, starts
    for slot, user in enumerate(pack):
        alone = {
            name: values[slot : slot + 1].clone().requires_grad_() for name, values in start.items()
        }
        batch = collate(user.train, backbone.device)
        slots = torch.zeros(len(user.train), dtype=torch.long)
        prefix = PackPrefix(alone, backbone.facts, method.visibility)
        backbone.token_nll(batch, prefix.of_rows(slots, backbone.dtype, None)).mean().backward()
        for name, leaf in alone.items():
            assert leaf.grad is not None
            torch.testing.assert_close(gradients[name][slot], leaf.grad[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e30])
def test_a_user_whose_loss_is_not_finite_fails_alone(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    method, pack = METHODS["direct-words"], users()[:3]
    healthy = train_packed(backbone, method, config(), pack)
    one_epoch = train_packed(backbone, method, config(epochs=1), pack)
    initial = PrefixTuning.initial

    def poisoned(
        self: PrefixTuning, facts: Any, words: dict[str, Tensor] | None, seed: int
    ) -> Parameters:
        made = initial(self, facts, words, seed)
        if seed == pack[1].seed:
            for parameter in made.trained.values():
                parameter.fill_(bad)
        return made

    monkeypatch.setattr(PrefixTuning, "initial", poisoned)
    results = train_packed(backbone, method, config(), pack)
    sick = results["bob"]
    if math.isfinite(bad):  # huge values with a finite loss from which nothing is learned
        assert sick.error is None
        assert sick.resets == 0
        assert all(math.isfinite(line["valid"] or math.nan) for line in sick.history)
    else:
        assert sick.kv is None
        assert sick.error is not None
        assert "not finite" in sick.error
        assert (sick.steps, sick.resets) == (0, 1), "a failed user is not trained further"
    for key in ("alice", "carol"):
        assert_same(results[key], healthy[key])
    # With the same rows in the batch (no user dropped yet), a neighbour is equal bit for bit.
    again = train_packed(backbone, method, config(epochs=1), pack)
    for key in ("alice", "carol"):
        ours, wanted = again[key].kv, one_epoch[key].kv
        assert ours is not None
        assert wanted is not None
        assert torch.equal(as_layers(ours), as_layers(wanted))
        assert again[key].history == one_epoch[key].history


@methods
@pytest.mark.parametrize("times", [1, 2])
def test_a_user_whose_loss_diverges_restarts_once_at_a_lower_rate_then_fails_alone(
    backbone: Backbone, method: Any, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    pack = users()[3:]
    gentle = train_packed(backbone, method, config(learning_rate=2e-3), pack[:1])["dave"]
    same_rate = train_packed(backbone, method, config(learning_rate=2e-2), pack)
    DivergingTraining(
        monkeypatch, slot=0, times=times
    )  # the user, or the first member of its ensemble
    results = train_packed(backbone, method, config(learning_rate=2e-2), pack)
    sick = results["dave"]
    assert sick.resets == 1
    if times == 1:
        assert sick.error is None
        assert sick.members is not None
        # As if started at a tenth of the rate. Other members of an ensemble continue.
        for member, ours in enumerate(sick.members):
            expected = (gentle if member == 0 else same_rate["dave"]).members
            assert expected is not None
            for name, values in expected[member].items():
                torch.testing.assert_close(ours[name], values, atol=1e-4, rtol=0)
        if method.members == 1:
            assert_same(sick, gentle)
    else:
        assert sick.members is None
        assert sick.error is not None
        assert "not finite" in sick.error
        assert "0.1 times the learning rate" in sick.error
    assert_same(results["erin"], same_rate["erin"])


def test_the_plain_trainer_restarts_once_too(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, alice = METHODS["direct-words"], users()[0]
    gentle = train_user(backbone, method, config(learning_rate=2e-3), alice)
    step, left = torch.optim.AdamW.step, [1]

    def blown(self: Any) -> None:
        step(self)
        if left:
            left.pop()
            for parameter in self.param_groups[0]["params"]:
                parameter.data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", blown)
    again = train_user(backbone, method, config(learning_rate=2e-2), alice)
    assert again.resets == 1
    assert_same(again, gentle)


@methods
def test_a_continued_training_equals_one_that_never_stopped(
    backbone: Backbone, method: Any, tmp_path: Path
) -> None:
    """Through the resume file, beside neighbours that start. Exact with a constant rate."""
    pack = users()
    settings = {"schedule": "constant", "keep_resume": True}
    whole = train_packed(backbone, method, config(epochs=4, **settings), pack)
    half = train_packed(backbone, method, config(epochs=2, **settings), pack[:2])
    belongs = Belongs("u", "default", backbone.fingerprint, "s")
    going_on = []
    for user in pack[:2]:
        path = Resume(half[user.user_key].states, belongs).save(tmp_path / user.user_key)
        going_on.append(replace(user, init_ids=(), states=Resume.load(path).states))
    results = train_packed(backbone, method, config(epochs=4, **settings), [*going_on, *pack[2:]])
    for user in pack:
        assert_same(results[user.user_key], whole[user.user_key])
        assert results[user.user_key].steps == whole[user.user_key].steps
        assert results[user.user_key].tokens == whole[user.user_key].tokens
    for ours, theirs in zip(results["alice"].states, whole["alice"].states, strict=True):
        for name, moment in theirs.second.items():
            torch.testing.assert_close(ours.second[name], moment, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("times", [1, 2])
def test_a_continued_training_that_diverges_restarts_from_its_saved_state(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Once, at a lower rate, like a new training. Its neighbour is not affected."""
    method, pack = METHODS["mlp-words"], users()[2:4]

    def settings(epochs: int, rate: float) -> TrainConfig:
        return config(epochs=epochs, learning_rate=rate, schedule="constant", keep_resume=True)

    first = train_packed(backbone, method, settings(1, 1e-2), pack)
    going_on = [replace(user, init_ids=(), states=first[user.user_key].states) for user in pack]
    undisturbed = train_packed(backbone, method, settings(3, 1e-2), going_on)
    gentle = train_packed(backbone, method, settings(3, 1e-3), going_on)
    update, second, left = Slots.update, first["dave"].steps + 2, [times]

    def blown(slots: Slots, *args: Any) -> None:
        update(slots, *args)
        if left[0] and slots.updates[1] == second:
            left[0] -= 1
            for parameter in slots.trained.values():
                parameter[1] = float("nan")

    monkeypatch.setattr(Slots, "update", blown)
    results = train_packed(backbone, method, settings(3, 1e-2), going_on)
    sick = results["dave"]
    assert sick.resets == 1
    if times == 1:
        assert_same(sick, gentle["dave"])
        assert sick.states[0].scale == pytest.approx(0.1)
    else:
        assert sick.members is None
        assert "0.1 times the learning rate" in str(sick.error)
    assert_same(results["carol"], undisturbed["carol"])


def test_many_long_labels_need_not_fit_the_models_positions() -> None:
    """A virtual token starts as the mean of a label's tokens, however many there are."""
    backbone = build(FAMILIES["gpt2"]())  # 128 learned positions
    labels = [random_ids(40, n) for n in range(P)]
    user = replace(
        users()[0],
        init_ids=tuple(token for label in labels for token in label),
        spans=tuple(len(label) for label in labels),
    )
    method = PromptTuning(num_virtual_tokens=P, init="labels")
    still = config(epochs=1, learning_rate=1e-12)
    kept = train_packed(backbone, method, still, [user])["alice"].kv
    assert kept is not None
    table = backbone.model.get_input_embeddings().weight  # type: ignore[operator]
    for n, label in enumerate(labels):
        wanted = table[label].mean(0)
        torch.testing.assert_close(kept["embeddings"][n], wanted, atol=1e-6, rtol=0)
    assert_same(
        train_packed(backbone, method, config(), [user])["alice"],
        train_user(backbone, method, config(), user),
    )


@methods
def test_a_training_can_start_from_a_trained_prefix(backbone: Backbone, method: Any) -> None:
    """With an encoder too: its output, zero at first, is added to the prefix."""
    alice = users()[0]
    first = train_packed(backbone, method, config(), [alice])["alice"]
    assert first.members is not None
    warm = replace(alice, start=first.members)
    almost_still = config(epochs=1, learning_rate=1e-12)
    again = train_packed(backbone, method, almost_still, [warm])["alice"]
    assert again.members is not None
    for ours, theirs in zip(again.members, first.members, strict=True):
        for name, values in theirs.items():
            torch.testing.assert_close(ours[name], values, atol=1e-5, rtol=0)
    further = train_packed(backbone, method, config(), [warm])["alice"]
    assert_same(further, train_user(backbone, method, config(), warm))
    # Beside a neighbour that starts from words or at random, in either order.
    bob = users()[1]
    alone = train_packed(backbone, method, config(), [bob])["bob"]
    for pack in ([warm, bob], [bob, warm]):
        results = train_packed(backbone, method, config(), pack)
        assert_same(results["alice"], further)
        assert_same(results["bob"], alone)


@pytest.fixture(scope="module")
def kept(backbone: Backbone) -> Resume:
    settings = config(epochs=1, keep_resume=True)
    states = train_packed(backbone, METHODS["mlp-words"], settings, users()[:1])["alice"].states
    return Resume(states, Belongs("u", "default", backbone.fingerprint, "s"))


def test_a_damaged_resume_file_is_refused(backbone: Backbone, kept: Resume) -> None:
    data = kept.to_bytes()
    assert Resume.from_bytes(data).belongs == kept.belongs
    old = data.replace(b'"format":"2"', b'"format":"9"')
    for bad in (data[: len(data) // 2], b"", b"x" * 100, old):
        with pytest.raises(CorruptArtifact):
            Resume.from_bytes(bad)
    same, method = Resume.from_bytes(data), METHODS["mlp-words"]
    same.check(kept.belongs, method, backbone.facts, epochs=1)
    for changes, error in (
        ({"user_key": "v"}, WrongUser),
        ({"prefix_name": "tone"}, WrongUser),
        ({"backbone_fingerprint": "f"}, WrongBackbone),
        ({"settings": "t"}, WrongMethod),
    ):
        with pytest.raises(error):
            same.check(replace(kept.belongs, **changes), method, backbone.facts, epochs=1)
    with pytest.raises(WrongMethod, match="past the requested epochs"):
        same.check(kept.belongs, method, backbone.facts, epochs=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epoch", "x"), ("updates", 1.5), ("scale", None), ("history", [1]), ("history", [{}])],
)
def test_a_resume_file_with_odd_numbers_is_refused(kept: Resume, field: str, value: Any) -> None:
    odd = Resume((replace(kept.states[0], **{field: value}),), kept.belongs)
    with pytest.raises(CorruptArtifact):
        Resume.from_bytes(odd.to_bytes())


@pytest.mark.parametrize("group", ["trained", "fixed", "first", "second", "best"])
@pytest.mark.parametrize("how", ["missing", "other shape"])
def test_an_incomplete_training_state_is_refused(
    backbone: Backbone, kept: Resume, group: str, how: str
) -> None:
    """Before it is put into one tensor with a neighbour's."""
    state = kept.states[0]
    tensors = dict(getattr(state, group))
    name, values = tensors.popitem()
    if how == "other shape":
        tensors[name] = values[..., :-1]
    changed: dict[str, Any] = {group: tensors}
    bad = Resume((replace(state, **changed),), kept.belongs)
    read = Resume.from_bytes(bad.to_bytes())
    with pytest.raises(CorruptArtifact, match="not complete"):
        read.check(kept.belongs, METHODS["mlp-words"], backbone.facts, epochs=1)
    with pytest.raises(CorruptArtifact, match="0 states, of 1"):
        Resume((), kept.belongs).check(kept.belongs, METHODS["mlp-words"], backbone.facts, 1)


def test_continuing_is_exact_where_a_batch_has_no_labels(backbone: Backbone) -> None:
    """Such a batch is a step of the schedule but not an update of AdamW."""
    method, user = METHODS["direct-words"], users()[0]
    silent = Encoded(user.train[0].input_ids, [IGNORE] * len(user.train[0].labels))
    user = replace(user, train=(silent, *user.train[1:]))
    settings = {"schedule": "constant", "keep_resume": True, "batch_size": 1}
    whole = train_packed(backbone, method, config(epochs=2, **settings), [user])["alice"]
    half = train_packed(backbone, method, config(epochs=1, **settings), [user])["alice"]
    assert half.states[0].updates == half.states[0].steps - 1
    going_on = replace(user, init_ids=(), states=half.states)
    result = train_packed(backbone, method, config(epochs=2, **settings), [going_on])["alice"]
    assert_same(result, whole, atol=1e-6)


def test_a_user_without_train_rows_fails_alone(backbone: Backbone) -> None:
    empty = UserRows(user_key="empty", seed=1, train=(), valid=(random_row(6, 3, 1),))
    alice = users()[0]
    for method in FAST:
        results = train_packed(backbone, method, config(), [empty, alice])
        assert results["empty"].kv is None
        assert results["empty"].error is not None
        assert_same(results["alice"], train_packed(backbone, method, config(), [alice])["alice"])


def test_the_end_of_a_users_training_is_reported_once_and_at_once(backbone: Backbone) -> None:
    """An ensemble ends with its last member. A user who cannot be trained ends at once."""
    few, many = (
        user_rows(user, rows, valid=1, init_ids=P) for user, rows in (("few", 2), ("many", 9))
    )
    empty = UserRows(user_key="empty", seed=1, train=(), valid=(random_row(6, 3, 1),))
    told: list[tuple[str, int]] = []
    steps = 0

    def counted(machine: Machine[list[Trained]]) -> Machine[list[Trained]]:
        nonlocal steps
        result: Any = None
        while True:
            try:
                work = machine.send(result)
            except StopIteration as end:
                return end.value
            steps += isinstance(work, Train)
            result = yield work

    machine = train_pack(
        backbone,
        METHODS["prompt-ensemble"],
        config(epochs=2),
        [many, empty, few],
        lambda user: told.append((user, steps)),
    )
    LocalDriver(backbone).run(counted(machine))
    assert [user for user, _ in told] == ["empty", "few", "many"]
    nothing, early, last = [at for _, at in told]
    assert nothing == 0 < early < last == steps


def test_training_leaves_the_frozen_weights_as_they_were(backbone: Backbone) -> None:
    before = backbone.checksum()
    train_packed(backbone, METHODS["mlp-random"], config(), users())
    assert backbone.checksum() == before
    backbone.verify_unchanged(before)
    assert all(p.grad is None for p in backbone.model.parameters())


def test_a_changed_weight_is_noticed_wherever_it_is() -> None:
    backbone = build(FAMILIES["gpt2"]())
    before = backbone.checksum()
    for parameter in list(backbone.model.parameters())[::5]:
        flat = parameter.data.view(-1)
        old = flat[-1].clone()
        flat[-1] += 1e-3
        with pytest.raises(BackboneChanged):
            backbone.verify_unchanged(before)
        flat[-1] = old
        backbone.verify_unchanged(before)
        if len(flat) > 1 and flat[0] != flat[-1]:  # swapping values keeps every plain sum
            flat[[0, -1]] = flat[[-1, 0]]
            assert backbone.checksum() != before
            flat[[0, -1]] = flat[[-1, 0]]
    assert backbone.checksum() == before


def test_a_seed_decides_the_initial_prefix_and_the_order_of_rows(backbone: Backbone) -> None:
    alice = users()[0]
    for method in FAST:
        runs = [
            train_packed(backbone, method, config(), [replace(alice, seed=seed)])["alice"]
            for seed in (1, 1, 2)
        ]
        kvs = [next(iter(run.kv.values())) for run in runs if run.kv is not None]
        assert torch.equal(kvs[0], kvs[1])
        assert not torch.equal(kvs[0], kvs[2])


def test_a_prefix_starts_as_the_activations_of_its_init_words(backbone: Backbone) -> None:
    """With an MLP too: its output starts at zero and is added to the activations."""
    alice = users()[0]
    with torch.no_grad():
        words, _ = backbone.capture(torch.tensor([alice.init_ids]))
    start = {name: values[0] for name, values in words.items()}
    for name in ("direct-words", "mlp-words"):
        method = METHODS[name]
        made = method.initial(backbone.facts, start, seed=1)
        compiled = method.compile(
            {key: p.unsqueeze(0) for key, p in made.trained.items()},
            {key: p.unsqueeze(0) for key, p in made.fixed.items()},
            backbone.facts,
        )
        assert torch.equal(as_layers(compiled), as_layers(words))


@pytest.mark.parametrize("method", [METHODS["direct-random"], METHODS["mlp-random"]])
def test_a_slot_is_updated_as_by_torchs_adamw_and_only_when_it_is_named(
    backbone: Backbone, method: PrefixTuning
) -> None:
    """Each slot has a separate step count, rate and norm, whoever else is updated."""
    settings = TrainConfig(
        weight_decay=0.05, max_grad_norm=0.5, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-3
    )
    initial = [method.initial(backbone.facts, None, seed) for seed in range(3)]
    slots = Slots(method, backbone.facts, initial, backbone.device)
    twins = [
        {name: p.clone().unsqueeze(0).requires_grad_() for name, p in one.trained.items()}
        for one in initial
    ]
    optimizers = [
        torch.optim.AdamW(
            twin.values(), betas=(0.8, 0.95), eps=1e-3, weight_decay=settings.weight_decay
        )
        for twin in twins
    ]
    generator = torch.Generator().manual_seed(1)
    for turn, named in enumerate([[0, 2], [2], [1, 2], [2, 0]]):
        target = torch.randn((3, *kv_shape(backbone, P)), generator=generator)
        leaves = slots.leaves()
        (target * as_layers(leaves.tensors)).sum().backward()
        rates = [0.01 * (slot + 1) / (turn + 1) for slot in named]
        slots.update(leaves, named, rates, settings)
        for slot, rate in zip(named, rates, strict=True):
            optimizers[slot].param_groups[0]["lr"] = rate
            optimizers[slot].zero_grad()
            kv = as_layers(method.compile(twins[slot], {}, backbone.facts))
            (target[slot] * kv[0]).sum().backward()
            torch.nn.utils.clip_grad_norm_(twins[slot].values(), 0.5)
            optimizers[slot].step()
    for slot, twin in enumerate(twins):
        for name, parameter in twin.items():
            torch.testing.assert_close(
                slots.trained[name][slot], parameter[0].detach(), atol=1e-6, rtol=1e-5
            )


def test_scoring_many_users_at_once_gives_each_its_own_rows_under_its_own_prefix(
    backbone: Backbone,
) -> None:
    pack = users()
    rows = [user.train for user in pack]
    kv = random_kv(backbone, P, seed=1, users=len(pack))
    driver = LocalDriver(backbone)
    for budget in (1, 60, 10_000):
        pack_of_all = PackPrefix(as_groups(kv), backbone.facts)
        together = driver.run(score_split(backbone, rows, pack_of_all, budget))
        for slot, user in enumerate(pack):
            own = PackPrefix(as_groups(kv[slot : slot + 1]), backbone.facts)
            (alone,) = driver.run(score_split(backbone, [user.train], own, 10_000))
            assert together[slot].tokens == alone.tokens
            assert together[slot].tokens == tuple(row.supervised for row in user.train)
            assert together[slot].nats == pytest.approx(alone.nats, abs=1e-4)
    base = driver.run(score_split(backbone, rows, None, 60))
    assert base[0].nats != pytest.approx(together[0].nats, abs=1e-2)
    assert driver.run(score_split(backbone, [(), rows[1]], None, 60))[0].nll is None


def test_more_virtual_tokens_than_positions_are_refused() -> None:
    backbone = build(FAMILIES["gpt2"]())  # 128 positions
    with pytest.raises(MethodError, match="positions"):
        train_packed(backbone, PrefixTuning(num_virtual_tokens=128), config(), users())


def test_words_are_needed_where_the_method_starts_from_words(backbone: Backbone) -> None:
    with pytest.raises(MethodError):
        METHODS["direct-words"].initial(backbone.facts, None, seed=1)


# Pure parts


@given(lengths=st.lists(st.integers(1, 60), max_size=40), budget=st.integers(1, 200))
def test_microbatches_hold_every_row_once_within_the_budget(
    lengths: list[int], budget: int
) -> None:
    groups = microbatches(lengths, budget)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(groups)
    for group in groups:
        longest = max(lengths[row] for row in group)
        assert len(group) == 1 or len(group) * longest <= budget
    flat = [lengths[row] for group in groups for row in group]
    assert flat == sorted(flat, reverse=True)
    assert groups == microbatches(lengths, budget)
    for one, two in pairwise(groups):  # no group has room for one more
        assert (len(one) + 1) * lengths[one[0]] > budget
        assert lengths[two[0]] <= lengths[one[-1]]


@given(
    rows=st.integers(0, 50),
    size=st.integers(1, 12),
    seed=st.integers(0, 2**62),
    epoch=st.integers(1, 9),
)
def test_an_epochs_batches_hold_every_row_once_and_depend_on_seed_and_epoch_alone(
    rows: int, size: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(rows, size, seed=seed, epoch=epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert len(batches) == math.ceil(rows / size)
    assert all(len(batch) == size for batch in batches[:-1])
    assert batches == epoch_batches(rows, size, seed=seed, epoch=epoch)
    order = [row for batch in batches for row in batch]
    other_size = epoch_batches(rows, size + 1, seed=seed, epoch=epoch)
    assert order == [row for batch in other_size for row in batch]
    if rows >= 20:
        assert batches != epoch_batches(rows, size, seed=seed, epoch=epoch + 1)
        assert batches != epoch_batches(rows, size, seed=seed + 1, epoch=epoch)


@given(
    total=st.integers(1, 200),
    warmup=st.floats(0, 0.99),
    schedule=st.sampled_from(["linear", "constant"]),
    peak=st.floats(1e-6, 1),
)
def test_the_learning_rate_rises_to_its_peak_and_never_leaves_its_range(
    total: int, warmup: float, schedule: Any, peak: float
) -> None:
    settings = TrainConfig(warmup_fraction=warmup, schedule=schedule)
    rates = [learning_rate_at(settings, peak, step, total) for step in range(total)]
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates)
    assert max(rates) == pytest.approx(peak)
    top = int(warmup * total)
    assert rates[:top] == sorted(rates[:top])
    if schedule == "constant":
        assert all(rate == peak for rate in rates[top:])
    else:
        assert rates[top:] == sorted(rates[top:], reverse=True)
        assert rates[-1] == pytest.approx(peak / (total - top))


@given(total=st.integers(1, 60), warmup=st.floats(0, 0.99))
def test_the_linear_schedule_is_that_of_transformers(total: int, warmup: float) -> None:
    """Except that warm-up is one step ahead: theirs begins with a step at a rate of zero."""
    rising = int(warmup * total)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule = get_linear_schedule_with_warmup(optimizer, rising, total)
    theirs = []
    for _ in range(total + 1):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    settings = TrainConfig(warmup_fraction=warmup)
    for step in range(total):
        expected = theirs[step + 1] if step < rising else theirs[step]
        assert learning_rate_at(settings, 0.3, step, total) == pytest.approx(expected)


@given(
    losses=st.lists(
        st.floats(0, 10) | st.floats(5, 5 + 3 * EQUAL_LOSS) | st.none(), min_size=1, max_size=12
    ),
    patience=st.none() | st.integers(1, 4),
)
def test_the_best_epoch_is_the_first_lowest_and_patience_is_counted_from_it(
    losses: list[float | None], patience: int | None
) -> None:
    """The lowest, apart from differences within rounding."""
    stopper, seen = BestEpoch(patience), []
    best, best_at = math.inf, -1
    for epoch, loss in enumerate(losses):
        is_best, stop = stopper.see(loss)
        if loss is None:  # kept: there is no loss to compare
            assert (is_best, stop) == (True, False)
            continue
        seen.append(loss)
        assert is_best == (loss < best - EQUAL_LOSS)
        best, best_at = (loss, epoch) if is_best else (best, best_at)
        assert best <= min(seen) + EQUAL_LOSS
        since_best = sum(one is not None for one in losses[best_at + 1 : epoch + 1])
        assert stop == (patience is not None and since_best >= patience)
        if stop:
            break


def test_rounding_does_not_choose_an_epoch() -> None:
    """Losses in a pack and alone differ in the last bits, and must choose the same epoch."""
    noise = 5e-7
    for last in (5.0 - noise, 5.0 + noise):
        stopper = BestEpoch(None)
        assert [stopper.see(loss)[0] for loss in (5.1, 5.0, last)] == [True, True, False]


@given(ids=st.lists(st.integers(0, 99), min_size=1, max_size=9), count=st.integers(1, 30))
def test_words_fill_exactly_the_virtual_tokens(ids: list[int], count: int) -> None:
    filled = fill_words(ids, count)
    assert len(filled) == count
    assert filled[: len(ids)] == ids[:count]
    assert set(filled) <= set(ids)


@hypothesis_settings(max_examples=12)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=4),
    batch_size=st.integers(1, 4),
    budget=st.integers(1, 120),
    method=st.sampled_from(list(METHODS)),
)
def test_any_pack_equals_the_plain_trainer(
    backbone: Backbone,
    sizes: list[tuple[int, int]],
    batch_size: int,
    budget: int,
    method: str,
) -> None:
    pack = [
        user_rows(f"{n}-{train}-{valid}", train, valid, init_ids=P)
        for n, (train, valid) in enumerate(sizes)
    ]
    settings = config(
        epochs=2, batch_size=batch_size, tokens_per_microbatch=budget, patience=1, seed=3
    )
    results = train_packed(backbone, METHODS[method], settings, pack)
    for user in pack:
        expected = train_user(backbone, METHODS[method], settings, user)
        assert_same(results[user.user_key], expected)
