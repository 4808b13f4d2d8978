"""Every request ends in exactly one last event, whatever happens to client, step or engine."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence

import pytest
import torch
from serving import Gate, Listener, MakeRequest, make_engine, make_held_prefix
from waiting import wait_until

from ptuning.errors import ServeError
from ptuning.model.backbone import Backbone
from serve.engine.engine import CANCELLED, DIED, SHUTTING_DOWN, Engine, Request
from serve.events import Event, Failed, Finished

PROMPT_SECONDS = 10.0  # far below serve.request_timeout_s (300 s), which must not be needed


def last_event(heard: Listener) -> Event:
    """The last event. Fails if another follows."""
    last = heard.wait(PROMPT_SECONDS)[-1]
    time.sleep(0.05)
    with pytest.raises(queue.Empty):
        heard.events.get_nowait()
    return last


def assert_dead(engine: Engine, request: Request) -> None:
    wait_until(lambda: not engine.alive, PROMPT_SECONDS)
    with pytest.raises(ServeError, match="not running"):
        engine.submit(request)


@pytest.mark.parametrize("operation", ["leave", "move"])
def test_a_slot_that_cannot_be_cleared_or_moved_ends_the_engine_and_everybody_is_told(
    backbone: Backbone, make_request: MakeRequest, operation: str
) -> None:
    engine = make_engine(backbone, max_rows=2)
    gate = Gate(engine)
    # The row that ends first is in the middle (move) or the last one (leave).
    short, long = (3, 50) if operation == "move" else (50, 3)
    running = [make_request(f"r{n}", None, max_tokens=m) for n, m in enumerate((short, long))]
    waiting = [make_request(f"w{n}", make_held_prefix(backbone, 3, n)) for n in range(2)]
    for request, _ in (*running, *waiting):
        engine.submit(request)

    def lost(*_slots: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    setattr(engine.runner, operation, lost)
    gate.open()
    ended = running[0 if operation == "move" else 1][1]
    assert isinstance(last_event(ended), Finished), (
        "its answer was complete before the slot was lost"
    )
    others = [heard for _, heard in (*running, *waiting) if heard is not ended]
    assert [last_event(heard) for heard in others] == [Failed(problem=DIED)] * 3
    assert DIED.status == 503
    assert_dead(engine, waiting[0][0])


@pytest.mark.parametrize("error", [RuntimeError("no luck"), SystemExit(1), MemoryError()])
def test_the_death_of_the_engines_thread_fails_all_that_run_and_wait_at_once(
    backbone: Backbone,
    make_request: MakeRequest,
    error: BaseException,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_engine(backbone, max_rows=1)
    gate = Gate(engine)
    made = [make_request(f"r{n}", None, max_tokens=50) for n in range(3)]
    for request, _ in made:
        engine.submit(request)
    made[0][1].wait_for_start()

    def broken() -> tuple[str, ...]:
        raise error

    engine._batcher.admit = broken  # type: ignore[method-assign]
    began = time.monotonic()
    gate.open()
    assert [last_event(heard) for _, heard in made] == [Failed(problem=DIED)] * 3
    assert time.monotonic() - began < PROMPT_SECONDS
    assert_dead(engine, made[0][0])
    [record] = [r for r in caplog.records if r.levelno == logging.CRITICAL]
    assert type(error).__name__ in record.getMessage()
    assert "no luck" not in record.getMessage()
    values = engine.metrics.snapshot({}, []).values
    assert values["ptuning_engine_deaths_total", ()] == 1


def test_a_step_that_fails_and_whose_slots_cannot_be_cleared_tells_each_of_its_rows(
    backbone: Backbone, make_request: MakeRequest
) -> None:
    engine = make_engine(backbone)
    gate = Gate(engine)
    made = [make_request(f"r{n}", None, max_tokens=50) for n in range(3)]
    for request, _ in made:
        engine.submit(request)

    def broken(*_arguments: object) -> None:
        raise RuntimeError("CUDA error")

    for _, heard in made:
        heard.wait_for_start()
    for name in ("decode", "leave", "move"):
        setattr(engine.runner, name, broken)
    gate.open()
    lasts = [last_event(heard) for _, heard in made]
    assert all(isinstance(last, Failed) and last.problem.status >= 500 for last in lasts)
    assert_dead(engine, made[0][0])


@pytest.mark.parametrize("rows", [1, 2])
def test_a_cancelled_request_ends_in_an_event_whether_it_runs_or_waits(
    backbone: Backbone, make_request: MakeRequest, rows: int
) -> None:
    engine = make_engine(backbone, max_rows=rows)
    try:
        gate = Gate(engine)
        first, _ = make_request("first", None, max_tokens=400)
        second, heard = make_request("second", None, max_tokens=400)
        engine.submit(first)
        engine.submit(second)
        wait_until(lambda: engine.rows_in_use == rows)
        engine.cancel(second.id)
        engine.cancel(second.id)
        engine.cancel(first.id)
        gate.open()
        assert last_event(heard) == Failed(problem=CANCELLED)
        wait_until(lambda: engine.rows_in_use == engine.queue_length == 0)
        assert engine._requests == {}
    finally:
        engine.close()


def test_a_request_whose_listener_is_gone_frees_its_row(
    backbone: Backbone, make_request: MakeRequest
) -> None:
    engine = make_engine(backbone, max_rows=1)
    try:
        gate = Gate(engine)

        def emit(_event: object) -> None:
            raise RuntimeError("Event loop is closed")

        request, _ = make_request("deaf", None, max_tokens=400)
        engine.submit(Request(**{**vars(request), "emit": emit}))
        other, heard = make_request("other", None, max_tokens=3)
        engine.submit(other)
        gate.steps.release(5)  # of the 400 that the first one would take
        assert isinstance(last_event(heard), Finished)
        assert engine.rows_in_use == 0
    finally:
        gate.open()
        engine.close()


def test_closing_during_prefill_tells_the_newcomer_and_those_who_wait(
    backbone: Backbone, make_request: MakeRequest
) -> None:
    engine = make_engine(backbone, max_rows=1)
    inside, may_go = threading.Event(), threading.Event()
    prefill = engine.runner.prefill

    def slow(first: int, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        inside.set()
        assert may_go.wait(30)
        return prefill(first, prompts)

    engine.runner.prefill = slow  # type: ignore[method-assign]
    made = [make_request(f"r{n}", None, max_tokens=50) for n in range(2)]
    for request, _ in made:
        engine.submit(request)
    assert inside.wait(30)
    engine.close(timeout_s=0.1)  # the step outlasts it
    lasts = [last_event(heard) for _, heard in made]
    may_go.set()
    assert lasts == [Failed(problem=SHUTTING_DOWN)] * 2
    engine._thread.join(30)
    assert [heard.events.empty() for _, heard in made] == [True, True]
    assert_dead(engine, made[0][0])


def test_a_failed_answer_is_one_log_line_with_its_id_and_digest_and_no_text(
    backbone: Backbone, make_request: MakeRequest, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(backbone)
    try:
        prefix = make_held_prefix(backbone, 3, 1)
        request, heard = make_request("my secret", prefix)

        def broken(*_arguments: object) -> torch.Tensor:
            raise RuntimeError("my secret")

        engine.runner.decode = broken  # type: ignore[assignment,method-assign]
        engine.submit(request)
        assert isinstance(last_event(heard), Failed)
    finally:
        engine.close()
    [record] = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert request.id in record.getMessage()
    assert prefix.info.digest in record.getMessage()
    assert "RuntimeError" in record.getMessage()
    assert "secret" not in caplog.text
