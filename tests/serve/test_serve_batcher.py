"""The batcher, without model and clock: which requests run in which slots."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ptuning.errors import ServeError
from serve.engine.batcher import Batcher, Move, QueueFull, State


def test_requests_are_admitted_in_order_of_arrival_into_the_next_slots() -> None:
    batcher = Batcher(max_rows=2, max_queue=5, prefill_tokens=100)
    for name in "abc":
        batcher.submit(name, 10)
    assert batcher.admit() == ("a", "b")
    assert batcher.rows == ("a", "b")
    assert batcher.waiting == ("c",)
    assert batcher.state("c") is State.WAITING


def test_the_last_row_fills_the_hole_of_a_released_one() -> None:
    batcher = Batcher(3, 0, 100)
    for name in "abc":
        batcher.submit(name, 1)
    batcher.admit()
    assert batcher.release("a") == (Move(source=2, target=0),)
    assert batcher.rows == ("c", "b")
    assert batcher.release("b") == (Move(source=1, target=1),)
    assert batcher.rows == ("c",)
    assert batcher.state("a") is None


def test_a_request_of_several_rows_is_admitted_whole_and_leaves_whole() -> None:
    batcher = Batcher(4, 4, 100)
    for name, rows in {"a": 1, "b": 2, "c": 2, "d": 1}.items():
        batcher.submit(name, 1, rows)
    assert batcher.admit() == ("a", "b", "b")  # c needs two slots, and no request overtakes it
    assert batcher.admit() == ()
    assert batcher.release("a") == (Move(source=2, target=0),)
    assert batcher.rows == ("b", "b")
    assert batcher.slots == {"b": [1, 0]}, "its second row moved into a's slot"
    assert batcher.admit() == ("c", "c")
    assert batcher.slots == {"b": [1, 0], "c": [2, 3]}
    assert batcher.release("b") == (Move(source=3, target=1), Move(source=2, target=0))
    assert batcher.rows == ("c", "c")
    assert batcher.slots == {"c": [0, 1]}
    with pytest.raises(ServeError, match="more rows"):
        batcher.submit("e", 1, rows=5)


def test_newcomers_of_one_step_stay_within_the_padded_token_budget() -> None:
    batcher = Batcher(8, 8, prefill_tokens=40)
    for name, tokens in {"a": 10, "b": 20, "c": 5}.items():
        batcher.submit(name, tokens)
    assert batcher.admit() == ("a", "b")  # with a third row of 20 it would be 60
    assert batcher.admit() == ("c",)


def test_a_prompt_longer_than_the_budget_is_admitted_alone() -> None:
    batcher = Batcher(8, 8, prefill_tokens=10)
    batcher.submit("long", 500)
    batcher.submit("short", 2)
    assert batcher.admit() == ("long",)
    assert batcher.admit() == ("short",)


def test_a_request_beyond_rows_and_queue_is_refused() -> None:
    batcher = Batcher(max_rows=1, max_queue=1, prefill_tokens=10)
    batcher.submit("a", 1)
    batcher.submit("b", 1)  # a is not admitted yet, but a row is free for it
    with pytest.raises(QueueFull):
        batcher.submit("c", 1)
    batcher.admit()
    with pytest.raises(QueueFull):
        batcher.submit("c", 1)
    assert batcher.withdraw("b")
    batcher.submit("c", 1)


def test_an_id_cannot_be_submitted_twice() -> None:
    batcher = Batcher(1, 1, 10)
    batcher.submit("a", 1)
    with pytest.raises(ServeError):
        batcher.submit("a", 1)


def test_only_waiting_requests_can_be_withdrawn() -> None:
    batcher = Batcher(1, 1, 10)
    batcher.submit("a", 1)
    batcher.admit()
    assert not batcher.withdraw("a")
    assert not batcher.withdraw("never seen")


class AnyOrder(RuleBasedStateMachine):
    """After any events in any order, the batcher agrees with a naive model of the slots."""

    ROWS, QUEUE, TOKENS = 3, 4, 30

    def __init__(self) -> None:
        super().__init__()
        self.batcher = Batcher(self.ROWS, self.QUEUE, self.TOKENS)
        self.slots: dict[int, tuple[str, int]] = {}  # the row that the cache would contain
        self.queue: list[tuple[str, int, int]] = []
        self.count = 0

    @rule(tokens=st.integers(1, 40), rows=st.integers(1, 3))
    def submit(self, tokens: int, rows: int) -> None:
        self.count += 1
        name = f"r{self.count}"
        free, beyond = self.ROWS - len(self.slots), 0
        for _, _, count in [*self.queue, ("", 0, rows)]:
            beyond += beyond > 0 or count > free
            free -= count
        if beyond > self.QUEUE:
            with pytest.raises(QueueFull):
                self.batcher.submit(name, tokens, rows)
            return
        self.batcher.submit(name, tokens, rows)
        self.queue.append((name, tokens, rows))

    @rule()
    def admit(self) -> None:
        first = len(self.slots)
        newcomers = self.batcher.admit()
        count = len(set(newcomers))
        taken, self.queue = self.queue[:count], self.queue[count:]
        assert newcomers == tuple(name for name, _, rows in taken for _ in range(rows))
        if count > 1:
            assert len(newcomers) * max(tokens for _, tokens, _ in taken) <= self.TOKENS
        assert newcomers or not self.queue or first + self.queue[0][2] > self.ROWS
        rows = [(name, place) for name, _, count in taken for place in range(count)]
        self.slots.update(enumerate(rows, first))

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.slots)))
        name, _ = self.slots[slot]
        moves = self.batcher.release(name)
        assert len(moves) == sum(own == name for own, _ in self.slots.values())
        for move in moves:
            assert self.slots.pop(move.target)[0] == name
            if move.source != move.target:
                self.slots[move.target] = self.slots.pop(move.source)

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.queue))
        assert self.batcher.withdraw(entry[0])
        self.queue.remove(entry)

    @invariant()
    def slots_are_dense_and_agree(self) -> None:
        assert dict(enumerate(self.batcher.rows)) == {
            n: name for n, (name, _) in self.slots.items()
        }
        where = {row: slot for slot, row in self.slots.items()}
        for name, slots in self.batcher.slots.items():
            assert slots == [where[name, place] for place in range(len(slots))]
        assert sum(map(len, self.batcher.slots.values())) == len(self.slots)
        assert self.batcher.waiting == tuple(name for name, _, _ in self.queue)
        assert self.batcher.busy == bool(self.slots or self.queue)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
