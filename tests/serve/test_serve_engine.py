"""Continuous batching of users with different prefixes equals each row alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from serving import (
    Gate,
    MakeRequest,
    expected_text,
    make_engine,
    make_held_prefix,
    member_of,
    oracle,
    random_kv,
    started_of,
    text_of,
)
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
)
from waiting import wait_until

from ptuning.errors import ServeError
from ptuning.model.backbone import Backbone
from ptuning.model.facts import DECODER
from ptuning.model.load import load_backbone
from ptuning.prefix.ready import ReadyPrefix
from serve.engine.batcher import QueueFull
from serve.engine.engine import CANCELLED, Engine, HeldPrefix, Request
from serve.engine.runner import SlotRunner
from serve.events import Delta, Failed, Finished
from serve.metrics import render


@pytest.fixture
def engine(backbone: Backbone) -> Iterator[Engine]:
    made = make_engine(backbone)
    yield made
    made.close()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_many_users_in_one_batch_equal_each_row_alone(
    model_dir: Path, make_request: MakeRequest, attention: str
) -> None:
    backbone = load_backbone(str(model_dir), dtype="float32", attention=attention, device="cpu")
    made = []
    for index, length in enumerate([0, 1, 5, 9, 0, 16, 3, 70, 2, 0, 8, 5]):
        prefix = make_held_prefix(backbone, length, index) if length else None
        text = f"user {index} says " + "word " * (index * 5 % 7)
        made.append(make_request(text, prefix, max_tokens=5 + 3 * (index % 5)))
    wanted = [expected_text(backbone, request) for request, _ in made]
    engine = make_engine(backbone)
    try:
        gate = Gate(engine)
        for number, (request, _) in enumerate(made):
            engine.submit(request)  # they join while others are decoded
            if number >= 3:
                gate.steps.release(2)
        gate.open()
        heard = [listener.wait() for _, listener in made]
    finally:
        engine.close()
    assert [text_of(events) for events in heard] == wanted
    assert len(set(wanted)) == len(wanted), "the prefixes and prompts change answers"
    for (request, _), events in zip(made, heard, strict=True):
        info = request.prefix.info if request.prefix else None
        assert started_of(events).prefix == info
        assert started_of(events).prompt_tokens == len(request.prompt)


def test_a_row_equals_the_plain_model_with_its_prefix_as_past_key_values(
    model_dir: Path, backbone: Backbone, engine: Engine, make_request: MakeRequest
) -> None:
    prefix = make_held_prefix(backbone, 6, 3)
    request, heard = make_request("tell me", prefix, max_tokens=16)
    plain = LlamaForCausalLM.from_pretrained(model_dir, attn_implementation="sdpa").eval()
    cache, tokens = DynamicCache(), []
    for layer, (key, value) in enumerate(prefix.ready.members[0].layers[DECODER]):
        cache.update(key[None], value[None], layer)
    step = torch.tensor([request.prompt])
    for _ in range(request.max_tokens):
        with torch.no_grad():
            logits = plain(step, past_key_values=cache, use_cache=True).logits
        tokens.append(int(logits[0, -1].argmax()))
        step = torch.tensor([tokens[-1:]])
    engine.submit(request)
    events = heard.wait()
    assert text_of(events) == backbone.template.decode(tokens)
    assert events[-1] == Finished(reason="length", completion_tokens=16)


def test_a_freed_slot_shows_nothing_to_the_next_request(
    backbone: Backbone, make_request: MakeRequest
) -> None:
    request, heard = make_request("short", None)
    wanted = expected_text(backbone, request)
    engine = make_engine(backbone, max_rows=1)
    try:
        before, listener = make_request("a long prompt " * 8, make_held_prefix(backbone, 40, 1))
        engine.submit(before)
        listener.wait()
        wait_until(lambda: engine.rows_in_use == 0)
        assert isinstance(engine.runner, SlotRunner)
        for layer in engine.runner.cache.slots:
            assert not layer.keys.any()
            assert not layer.values.any()
            # Poison the values that the next row does not overwrite: they must not be visible.
            layer.keys.fill_(1e4)
            layer.values.fill_(-1e4)
        engine.submit(request)
        assert text_of(heard.wait()) == wanted
    finally:
        engine.close()


def test_a_row_that_moves_into_a_freed_slot_goes_on_as_if_alone(
    backbone: Backbone, make_request: MakeRequest
) -> None:
    first, _ = make_request("first", make_held_prefix(backbone, 9, 1), max_tokens=30)
    last, heard = make_request("last one", make_held_prefix(backbone, 2, 2), max_tokens=30)
    wanted = expected_text(backbone, last)
    engine = make_engine(backbone)
    try:
        gate = Gate(engine)
        engine.submit(first)
        engine.submit(last)
        gate.steps.release(5)
        heard.wait_for_start()
        engine.cancel(first.id)
        gate.open()
        events = heard.wait()
    finally:
        engine.close()
    assert text_of(events) == wanted


def test_a_client_that_leaves_frees_its_row_for_those_who_wait(
    backbone: Backbone, make_request: MakeRequest
) -> None:
    engine = make_engine(backbone, max_rows=1)
    try:
        gate = Gate(engine)
        endless, listener = make_request("endless", None, max_tokens=400)
        waiting, heard = make_request("waiting", None, max_tokens=2)
        gone, silent = make_request("gone", None)
        for request in (endless, waiting, gone):
            engine.submit(request)
        listener.wait_for_start()
        engine.cancel(gone.id)
        engine.cancel(endless.id)
        engine.cancel("never seen")
        gate.open()
        assert isinstance(heard.wait()[-1], Finished)
        wait_until(lambda: engine.rows_in_use == 0 and engine.queue_length == 0)
        for left in (silent, listener):
            assert left.wait()[-1] == Failed(problem=CANCELLED)
    finally:
        engine.close()


def test_a_failing_step_fails_its_rows_and_the_engine_goes_on(
    engine: Engine, make_request: MakeRequest
) -> None:
    decode = engine.runner.decode

    def broken(tokens: Sequence[int], columns: Sequence[int]) -> torch.Tensor:
        engine.runner.decode = decode  # type: ignore[method-assign]
        raise RuntimeError("no luck")

    request, heard = make_request("hello")
    engine.runner.decode = broken  # type: ignore[method-assign]
    engine.submit(request)
    last = heard.wait()[-1]
    assert isinstance(last, Failed)
    assert last.problem.status == 500
    assert "no luck" not in last.problem.message
    again, heard = make_request("hello")
    engine.submit(again)
    assert isinstance(heard.wait()[-1], Finished)
    assert engine.rows_in_use == 0


def test_newcomers_that_fail_leave_running_rows_alone(
    backbone: Backbone, make_request: MakeRequest
) -> None:
    good, heard = make_request("good", make_held_prefix(backbone, 3, 1), max_tokens=20)
    wanted = expected_text(backbone, good)
    # A prefix of another shape, which the prefix cache would refuse.
    member = member_of(backbone, random_kv(backbone, 3, 1)[..., :3])
    wrong = HeldPrefix(info=make_held_prefix(backbone, 3, 1).info, ready=ReadyPrefix((member,)))
    bad, listener = make_request("bad", wrong)
    engine = make_engine(backbone)
    try:
        gate = Gate(engine)
        engine.submit(good)
        gate.steps.release(4)
        heard.wait_for_start()
        engine.submit(bad)
        gate.open()
        assert isinstance(listener.wait()[-1], Failed)
        assert text_of(heard.wait()) == wanted
    finally:
        engine.close()


def test_a_row_whose_values_are_not_finite_fails_alone(
    backbone: Backbone, make_request: MakeRequest
) -> None:
    good, heard = make_request("good", make_held_prefix(backbone, 3, 1), max_tokens=20)
    wanted = expected_text(backbone, good)
    prefix = make_held_prefix(backbone, 3, 2)
    for _, values in prefix.ready.members[0].layers[DECODER]:
        values.fill_(float("nan"))
    bad, listener = make_request("bad", prefix)
    after, later = make_request("after", None, max_tokens=8)
    wanted_after = expected_text(backbone, after)
    engine = make_engine(backbone, max_rows=2)
    try:
        for request in (bad, good, after):  # `after` gets the slot of `bad`
            engine.submit(request)
        assert isinstance(listener.wait()[-1], Failed)
        assert text_of(heard.wait()) == wanted
        assert text_of(later.wait()) == wanted_after
    finally:
        engine.close()


def test_a_listener_that_raises_disturbs_nobody(engine: Engine, make_request: MakeRequest) -> None:
    def emit(_event: object) -> None:
        raise RuntimeError("loop is closed")

    request, _ = make_request("deaf")
    engine.submit(Request(**{**vars(request), "emit": emit}))
    other, heard = make_request("other")
    engine.submit(other)
    assert isinstance(heard.wait()[-1], Finished)


def test_sampling_depends_on_the_seed_and_not_on_the_neighbours(
    backbone: Backbone, make_request: MakeRequest
) -> None:
    settings = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 25}
    texts = []
    for neighbours in (0, 3):
        engine = make_engine(backbone)
        try:
            others = [
                make_request(f"other {n}", None, **settings, seed=n) for n in range(neighbours)
            ]
            for request, _ in others:
                engine.submit(request)
            one, heard = make_request("one", make_held_prefix(backbone, 4, 1), **settings, seed=11)
            engine.submit(one)
            texts.append(text_of(heard.wait()))
        finally:
            engine.close()
    assert texts[0] == texts[1]
    engine = make_engine(backbone)
    try:
        one, heard = make_request("one", make_held_prefix(backbone, 4, 1), **settings, seed=12)
        engine.submit(one)
        assert text_of(heard.wait()) != texts[0]
    finally:
        engine.close()


def test_a_stop_string_ends_the_answer_before_itself(
    backbone: Backbone, engine: Engine, make_request: MakeRequest
) -> None:
    request, heard = make_request("hello", None, max_tokens=20)
    whole = expected_text(backbone, request)
    stop = whole[3:5]
    stopped, listener = make_request("hello", None, max_tokens=20, stop=(stop,))
    engine.submit(stopped)
    events = listener.wait()
    assert text_of(events) == whole[: whole.index(stop)]
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "stop"
    assert heard.events.empty()


def test_the_end_token_ends_the_answer_and_has_no_text(
    backbone: Backbone, engine: Engine, make_request: MakeRequest
) -> None:
    request, heard = make_request("hello", None, max_tokens=20)
    whole = oracle(backbone, request.prompt, None, 20)
    engine._ends = {whole[4]}
    engine.submit(request)
    events = heard.wait()
    cut = whole.index(whole[4])
    assert text_of(events) == backbone.template.decode(whole[:cut])
    assert events[-1] == Finished(reason="stop", completion_tokens=cut + 1)


def test_a_full_queue_refuses_and_takes_again_later(
    backbone: Backbone, make_request: MakeRequest
) -> None:
    engine = make_engine(backbone, max_rows=1, max_queue=1)
    try:
        gate = Gate(engine)
        requests = [make_request(f"r{n}") for n in range(3)]
        engine.submit(requests[0][0])
        engine.submit(requests[1][0])
        with pytest.raises(QueueFull):
            engine.submit(requests[2][0])
        gate.open()
        requests[1][1].wait()
        engine.submit(requests[2][0])
        assert isinstance(requests[2][1].wait()[-1], Finished)
    finally:
        engine.close()


def test_closing_answers_those_who_are_left_and_takes_nobody_more(
    backbone: Backbone, make_request: MakeRequest
) -> None:
    engine = make_engine(backbone, max_rows=1)
    gate = Gate(engine)
    made = [make_request(f"r{n}", None, max_tokens=100) for n in range(2)]
    for request, _ in made:
        engine.submit(request)
    made[0][1].wait_for_start()
    closer = threading.Thread(target=engine.close)
    closer.start()
    gate.open()
    closer.join(30)
    for _, heard in made:
        last = heard.wait()[-1]
        assert isinstance(last, Failed)
        assert last.problem.status == 503
    assert not engine.alive
    with pytest.raises(ServeError):
        engine.submit(made[0][0])


def test_the_figures_count_tokens_and_rows(engine: Engine, make_request: MakeRequest) -> None:
    made = [make_request(f"r{n}", None, max_tokens=4) for n in range(3)]
    for request, _ in made:
        engine.submit(request)
    counts = [heard.wait()[-1].completion_tokens for _, heard in made]  # type: ignore[union-attr]
    names = ["ptuning_tokens_generated_total", "ptuning_step_rows"]
    text = render([engine.metrics.snapshot({}, names, replica="x")])
    assert f'ptuning_tokens_generated_total{{replica="x"}} {sum(counts)}' in text
    assert 'ptuning_step_rows_bucket{replica="x",le="+Inf"}' in text


def test_deltas_are_emitted_as_tokens_come(engine: Engine, make_request: MakeRequest) -> None:
    request, heard = make_request("hello", None, max_tokens=12)
    engine.submit(request)
    deltas = [event for event in heard.wait() if isinstance(event, Delta)]
    assert len(deltas) > 3


def test_random_prefixes_change_the_answer(backbone: Backbone) -> None:
    prompt = backbone.template.ids("hello")
    answers = [oracle(backbone, prompt, random_kv(backbone, 4, seed), 8) for seed in range(4)]
    assert len({tuple(answer) for answer in [*answers, oracle(backbone, prompt, None, 8)]}) == 5
