"""Preparing a user: the init ids of a prefix, warm starts, and training digests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_backbones import FAMILIES, build, random_prefix

from ptuning.data.encode import Template
from ptuning.data.examples import arrange
from ptuning.errors import ConfigError, DataError, MethodError, WrongMethod
from ptuning.identity import RULES, BackboneIdentity, Recipe, digest_training
from ptuning.methods.base import Method
from ptuning.methods.prefix import PrefixTuning
from ptuning.methods.prompt import PromptTuning
from ptuning.methods.ptuning import PTuning
from ptuning.pack import encode_user
from ptuning.prefix.artifact import ArtifactConfig
from ptuning.scoring import nll
from ptuning.train.config import TrainConfig
from ptuning.train.start import warm_start
from ptuning.tuning import TuneResult, tune
from ptuning.types import Example, Message

BACKBONE = build(FAMILIES["llama"]())
TEMPLATE = BACKBONE.template


def rows(answers: list[str], **more: Any) -> list[Example]:
    examples = [
        Example(prompt=f"q {n}", completion=answers[n % len(answers)], **more) for n in range(10)
    ]
    return arrange(examples)


def init_ids_of(method: Method, examples: list[Example]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ready = encode_user(TEMPLATE, Recipe(method, TrainConfig()), "u", examples)
    return ready.init_ids, ready.spans


def test_every_member_starts_from_the_labels_and_draws_the_rest_for_itself() -> None:
    method = PromptTuning(num_virtual_tokens=4, init="labels", ensemble=3)
    words, spans = init_ids_of(method, rows(["yes sir", "no"]))
    assert len(spans) == 12
    pieces, at = [], 0
    for span in spans:
        pieces.append(words[at : at + span])
        at += span
    members = [pieces[n : n + 4] for n in (0, 4, 8)]
    labels = {tuple(TEMPLATE.ids("yes sir")), tuple(TEMPLATE.ids("no"))}
    for member in members:
        assert set(member[:2]) == labels
        assert all(len(drawn) == 1 for drawn in member[2:])
    assert len({tuple(member[2:]) for member in members}) == 3, "each member draws separately"


def test_members_that_start_from_labels_alone_are_not_the_same_prompt() -> None:
    method = PromptTuning(num_virtual_tokens=2, init="labels", ensemble=3)
    answers = ["yes", "no", "why"]
    words, spans = init_ids_of(method, rows(answers))
    pieces, at = [], 0
    for span in spans:
        pieces.append(words[at : at + span])
        at += span
    members = {tuple(pieces[n : n + 2]) for n in (0, 2, 4)}
    assert len(members) == 3
    assert {piece for own in members for piece in own} == {
        tuple(TEMPLATE.ids(answer)) for answer in answers
    }


def test_drawn_tokens_are_no_special_ones_and_depend_on_the_user_alone() -> None:
    method = PromptTuning(num_virtual_tokens=50, init="vocab")
    first, _ = init_ids_of(method, rows(["yes"]))
    assert first == init_ids_of(method, rows(["no"]))[0], "rows have no effect"
    assert not set(first) & set(TEMPLATE.tokenizer.all_special_ids)
    other = encode_user(TEMPLATE, Recipe(method, TrainConfig()), "v", rows(["yes"]))
    assert other.init_ids != first


def test_words_come_from_the_rows_then_the_configuration_then_the_answers() -> None:
    def first_words(method: Method, examples: list[Example]) -> str:
        return TEMPLATE.decode(init_ids_of(method, examples)[0][:2])

    told = PrefixTuning(num_virtual_tokens=2, init_text="over there")
    plain = PrefixTuning(num_virtual_tokens=2)
    assert first_words(told, rows(["yes"], init_words="hello you")) == TEMPLATE.decode(
        TEMPLATE.ids("hello you")[:2]
    )
    assert first_words(told, rows(["yes"])) == TEMPLATE.decode(TEMPLATE.ids("over there")[:2])
    assert first_words(plain, rows(["yes"])) == TEMPLATE.decode(TEMPLATE.ids("yes")[:2])


def test_init_words_without_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a user's rows fail that user. Those of the settings are refused before training."""
    ids = Template.ids
    monkeypatch.setattr(Template, "ids", lambda self, text: [] if text == "~" else ids(self, text))
    settings = TrainConfig(epochs=1)
    users = {"ann": rows(["yes"], init_words="~"), "bob": rows(["yes"])}
    for method in (
        PrefixTuning(num_virtual_tokens=2),
        PromptTuning(num_virtual_tokens=2),
        PTuning(template="{p:2}{prompt}", init="words"),
    ):
        results = tune(BACKBONE, users, method=method, train=settings)
        assert results["bob"].status == "trained"
        assert results["ann"].status == "failed"
        assert "'~'" in str(results["ann"].error)
        assert "init_words" in str(results["ann"].error)
        everybody = method.model_copy(update={"init_text": "~"})
        with pytest.raises(MethodError) as caught:
            tune(BACKBONE, users, method=everybody, train=settings)
        assert "method.init_text='~'" in str(caught.value.seen)
        assert caught.value.fix
    unused = PrefixTuning(num_virtual_tokens=2, init="random", init_text="~")
    assert tune(BACKBONE, users, method=unused, train=settings)["ann"].status == "trained"


@pytest.mark.parametrize(
    ("method", "other"),
    [
        (PromptTuning(num_virtual_tokens=4), PTuning(template="{p:4}{prompt} so", encoder="none")),
        (PrefixTuning(num_virtual_tokens=4), PrefixTuning(num_virtual_tokens=4, placement="infix")),
        (PrefixTuning(num_virtual_tokens=4), PrefixTuning(num_virtual_tokens=4, layers=1)),
        (PromptTuning(num_virtual_tokens=4), PromptTuning(num_virtual_tokens=4, ensemble=2)),
    ],
    ids=["template", "placement", "layers", "members"],
)
def test_only_a_prefix_of_the_same_kind_starts_a_training(method: Method, other: Method) -> None:
    own = random_prefix(BACKBONE, method, seed=1)
    assert len(warm_start(method, BACKBONE, own)) == method.members
    with pytest.raises(WrongMethod, match="does not have the form"):
        warm_start(method, BACKBONE, random_prefix(BACKBONE, other, seed=1))


def test_a_training_may_start_from_a_prefix_whose_template_is_spelled_differently() -> None:
    shorter = PTuning(template="{p:3}{prompt} so", encoder="none")
    longer = PTuning(template="{p:3}{prompt} so{completion}", encoder="none")
    prefix = random_prefix(BACKBONE, shorter, seed=1)
    (began,) = warm_start(longer, BACKBONE, prefix)
    assert torch.equal(began["embeddings"], prefix.tensors["embeddings"])


def test_what_decides_a_prefix_is_in_its_training_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(backbone: Any = None, started_from: str = "", **train: Any) -> str:
        recipe = Recipe(PrefixTuning(), TrainConfig(**train))
        known = BackboneIdentity("f", "float32", "t")
        return digest_training(recipe, replace(known, **(backbone or {})), "u", "d", started_from)

    assert digest() == digest(pack_users=3, tokens_per_microbatch=99, keep_resume=True)
    changed = [
        digest(),
        digest(adam_beta1=0.8),
        digest(adam_beta2=0.95),
        digest(adam_epsilon=1e-6),
        digest(min_valid_tokens=63),
        digest({"dtype": "bfloat16"}),
        digest({"fingerprint": "g"}),
        digest({"template_digest": "s"}),
        digest(started_from="p"),
    ]
    monkeypatch.setattr("ptuning.identity.RULES", "next")
    changed.append(digest())
    assert len({*changed}) == len(changed)


def test_the_dtype_of_an_identity_is_the_backbones_resolved_one() -> None:
    assert BackboneIdentity.of(BACKBONE).dtype == "float32"


# Validation losses by epoch, and the mean absolute value of the first member, by RULES.
GOLDEN: dict[str, dict[str, list[float]]] = {
    "2": {  # in "1", any difference made an epoch better
        "prefix": [5.937209, 5.862651, 5.836216, 0.602815],
        "prompt": [5.403866, 5.262221, 5.222363, 0.0924],
        "ptuning": [5.606543, 5.428187, 5.388116, 0.153606],
    }
}


@pytest.mark.parametrize("name", ["prefix", "prompt", "ptuning"])
def test_the_same_rows_and_settings_train_to_the_values_that_the_rules_say(name: str) -> None:
    """A user with an unchanged training digest keeps the prefix: new rules need a new digest."""
    method: Method = {
        "prefix": PrefixTuning(num_virtual_tokens=3, dropout=0.1),
        "prompt": PromptTuning(num_virtual_tokens=3, init="labels"),
        "ptuning": PTuning(template="{p:3}{prompt}", encoder="mlp", encoder_hidden_size=8),
    }[name]
    users = {"ann": [row(f"say {n}", f"so {n % 3}", n) for n in range(11)]}
    settings = TrainConfig(
        epochs=3, batch_size=2, warmup_fraction=0.2, weight_decay=0.01, min_valid_tokens=0
    )
    result = tune(BACKBONE, users, method=method, train=settings)["ann"]
    values = result.require().members[0].values()
    sizes = sum(float(value.abs().double().sum()) for value in values)
    count = sum(value.numel() for value in values)
    found = [*(float(line["valid"] or 0) for line in result.history), sizes / count]
    assert found == pytest.approx(GOLDEN[RULES][name], rel=1e-3), (
        "if this change is intended, raise RULES (ptuning/identity.py) and add the new values here"
    )


def test_the_training_digest_knows_the_methods_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    known = BackboneIdentity("f", "float32", "t")
    recipe = Recipe(PromptTuning(), TrainConfig())
    before = digest_training(recipe, known, "u", "d")
    assert before == digest_training(recipe, known, "u", "d")
    monkeypatch.setattr(PromptTuning, "default_learning_rate", 0.123)
    assert digest_training(recipe, known, "u", "d") != before


def test_tune_starts_from_a_prefix_or_continues_and_the_digest_says_so() -> None:
    """Beside a neighbour who starts at random. Equal digests mean equal prefixes."""
    method = PTuning(template="{p:3}{prompt}", encoder="mlp", encoder_hidden_size=8, init="random")
    users = {name: [row(f"say {name}", name, n) for n in range(8)] for name in ("ann", "bob")}

    def tuned(epochs: int, users: dict[str, list[Example]], **begun: Any) -> dict[str, TuneResult]:
        settings = TrainConfig(
            epochs=epochs,
            batch_size=2,
            schedule="constant",
            patience=None,
            keep_resume=True,
            min_valid_tokens=10**6,
        )
        return tune(BACKBONE, users, method=method, train=settings, **begun)

    first = tuned(1, users)
    prefixes = {name: one.prefix for name, one in first.items()}
    digests = {one.prefix.meta.training_digest for one in first.values() if one.prefix}
    begun = tuned(2, users, start={"ann": prefixes["ann"]})
    alone = tuned(2, {"ann": users["ann"]}, start={"ann": prefixes["ann"]})
    fresh = tuned(2, {"bob": users["bob"]})
    assert equal_trainings(begun["ann"], alone["ann"])
    assert equal_trainings(begun["bob"], fresh["bob"])
    for name, one in begun.items():
        assert one.prefix is not None
        assert one.prefix.meta.training_digest not in digests, name
    # A continued training keeps its start: it equals four epochs at once, not four from random.
    further = tuned(4, users, resume={name: one.resume for name, one in begun.items()})
    whole = tuned(4, users, start={"ann": prefixes["ann"]})
    for name in users:
        assert equal_trainings(further[name], whole[name]), name
    assert not equal_trainings(tuned(4, users)["ann"], whole["ann"])
    # A user whose start or resume state is unusable fails alone.
    assert begun["ann"].resume is not None
    assert prefixes["bob"] is not None
    for wrong, reason in (
        ({"start": {"ann": prefixes["bob"]}}, "another user"),
        ({"resume": {"ann": begun["bob"].resume}}, "another user"),
        ({"start": {"ann": prefixes["ann"]}, "resume": {"ann": begun["ann"].resume}}, "not both"),
        ({"resume": {"ann": replace(begun["ann"].resume, states=())}}, "not complete"),
    ):
        results = tuned(2, users, **wrong)
        assert results["ann"].prefix is None
        assert reason in str(results["ann"].error)
        assert equal_trainings(results["bob"], begun["bob"])
    assert "past the requested epochs" in str(
        tuned(1, users, resume={"ann": begun["ann"].resume})["ann"].error
    )


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "split": (Example(prompt="a", completion="b", split="validation"), "split"),  # type: ignore[arg-type]
    "completion": (Example(prompt="a", completion=5), "completion is not a string"),  # type: ignore[arg-type]
    "prompt": (Example(prompt=5, completion="b"), "prompt is not a string"),  # type: ignore[arg-type]
    "dicts": (Example(messages=({"role": "user", "content": "a"},)), "assistant"),  # type: ignore[arg-type]
    "last turn": (
        Example(messages=(Message(role="user", content="a"),)),
        "not from the assistant",
    ),
    "both": (
        Example(prompt="a", completion="b", messages=(Message(role="assistant", content="c"),)),
        "both messages and a prompt",
    ),
    "row": (("a", "b"), "not an Example but"),
    "time": (Example(prompt="a", completion="b", timestamp="2024-01-01"), "not an int but str"),  # type: ignore[arg-type]
    "float": (Example(prompt="a", completion="b", timestamp=2.0), "not an int but float"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_row_that_is_none_fails_its_user_alone(kind: str) -> None:
    bad, reason = BAD_ROWS[kind]
    good = [row(f"say {n}", "so", n) for n in range(9)]
    results = tune(
        BACKBONE,
        {"ann": [*good, bad], "bob": good},
        method=PrefixTuning(num_virtual_tokens=2),
        train=TrainConfig(epochs=1),
    )
    assert (results["ann"].status, results["bob"].status) == ("failed", "trained")
    assert reason in str(results["ann"].error)
    with pytest.raises(DataError, match=reason):
        nll(BACKBONE, [bad])


def test_a_user_with_too_few_rows_is_told_why() -> None:
    rows = [Example(prompt="a", completion="b", split="train") for _ in range(9)]
    result = tune(BACKBONE, {"ann": rows})["ann"]
    assert result.status == "too_few"
    assert "9 train and 0 valid rows" in str(result.error)
    assert "at least 8" in str(result.error)


def test_options_that_would_be_ignored_are_refused() -> None:
    method = PrefixTuning(num_virtual_tokens=2)
    users = {"ann": [row(f"say {n}", "so", n) for n in range(9)]}
    prefix = random_prefix(BACKBONE, method, seed=1)
    nothing: Any = None
    for options, seen in (
        ({"start": {"anne": prefix}}, "anne"),
        ({"resume": {"ann": nothing}}, "None for ann"),
        ({"train": TrainConfig(start="champion")}, "train.start=champion"),
    ):
        with pytest.raises(ConfigError) as caught:
            tune(BACKBONE, users, method=method, **options)
        assert seen in str(caught.value.seen)
        assert caught.value.fix
    stacks: tuple[Any, ...] = ("encoder",)
    for given in (users, {}):
        with pytest.raises(MethodError, match="no such stack"):
            tune(BACKBONE, given, method=PrefixTuning(stacks=stacks))
    with pytest.raises(MethodError, match="no such stack"):
        warm_start(PrefixTuning(stacks=stacks), BACKBONE, prefix)


def test_a_prefix_that_its_dtype_cannot_hold_is_no_prefix() -> None:
    """The losses are finite, but the file's values would not be."""
    users = {"ann": [row(f"say {n}", "so", n) for n in range(9)]}
    result = tune(
        BACKBONE,
        users,
        method=PrefixTuning(num_virtual_tokens=2),
        train=TrainConfig(epochs=1, learning_rate=1e6),
        artifact=ArtifactConfig(dtype="float16"),
    )["ann"]
    assert result.history
    assert (result.status, result.prefix, result.resume) == ("failed", None, None)
    assert "float16" in str(result.error)


def test_a_training_state_that_is_not_finite_is_refused() -> None:
    users = {"ann": [row(f"say {n}", "so", n) for n in range(9)]}
    options: dict[str, Any] = {
        "method": PrefixTuning(num_virtual_tokens=2),
        "train": TrainConfig(epochs=1, keep_resume=True),
    }
    kept = tune(BACKBONE, users, **options)["ann"].resume
    assert kept is not None
    for values in kept.states[0].best.values():
        values[:] = float("nan")
    again = tune(BACKBONE, users, resume={"ann": kept}, **options)["ann"]
    assert again.status == "failed"
    assert "best: values that are not finite" in str(again.error)


def row(prompt: str, completion: str, at: int) -> Example:
    return Example(prompt=prompt, completion=completion, timestamp=at)


def equal_trainings(one: TuneResult, other: TuneResult) -> bool:
    """Equal training digests, and equal values within rounding."""
    assert one.prefix is not None, one.error
    assert other.prefix is not None, other.error
    if one.prefix.meta.training_digest != other.prefix.meta.training_digest:
        return False
    for ours, theirs in zip(one.prefix.members, other.prefix.members, strict=True):
        for name, values in theirs.items():
            torch.testing.assert_close(ours[name], values, atol=1e-5, rtol=1e-5)
    return True
