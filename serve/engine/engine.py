"""Continuous batching: one thread owns the model, requests join and leave between steps.

A turn of the loop: drop those whose client left, prefill the newcomers together, then one
decoding step for every running row, each with its own user's prefix. What to do is decided
by `Batcher`; tensors are moved by `SlotRunner`. A failing step fails the rows in it, and the
loop goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptuning.errors import ServeError
from ptuning.generation import stop_ids
from ptuning.model.backbone import Backbone
from ptuning.prefix.ready import Member, ReadyPrefix, combine_logits, log_probability, pick_winner
from serve.engine.batcher import Batcher, State
from serve.engine.runner import make_runner
from serve.engine.sampling import choose, generator_of
from serve.engine.text import TextStream
from serve.events import Delta, Event, Failed, Finished, FinishReason, PrefixInfo, Problem, Started
from serve.metrics import Metrics

log = logging.getLogger("ptuning.serve")


@dataclass(frozen=True, kw_only=True)
class HeldPrefix:
    """A user's prefix in memory, ready for the model, and what the answer says of it."""

    info: PrefixInfo
    ready: ReadyPrefix

    @property
    def nbytes(self) -> int:
        return self.ready.nbytes


@dataclass(frozen=True, kw_only=True)
class Request:
    """An answer to be. `prompt` has the prefix's virtual tokens and anchors around it, where it
    has any. `emit` is called in the engine's thread and must not block."""

    id: str
    prompt: tuple[int, ...]
    prefix: HeldPrefix | None
    max_tokens: int
    emit: Callable[[Event], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    arrived: float = field(default_factory=time.monotonic)

    @property
    def members(self) -> tuple[Member | None, ...]:
        """The prefixes that answer together, one row each."""
        return (None,) if self.prefix is None else self.prefix.ready.members

    @property
    def prompt_tokens(self) -> int:
        """Real tokens of the prompt."""
        return sum(token >= 0 for token in self.prompt)


@dataclass
class _Voice:
    """One answer in the making: what it has said, and the token that it said last."""

    text: TextStream
    generator: torch.Generator | None
    last: int = 0
    count: int = 0
    said: str = ""
    log_p: float = 0.0  # of its tokens; counted where voices are compared
    reason: FinishReason | None = None  # why it ended


@dataclass
class _Running:
    """A request in the batch: one voice, or one for each member of an ensemble that votes; and
    where the next tokens go."""

    request: Request
    voices: list[_Voice]
    column: int  # P + prompt + generated tokens before it

    def voice(self, place: int) -> _Voice:
        """Whose tokens the request's row at `place` reads: its own member's, or the only one's."""
        return self.voices[place if len(self.voices) > 1 else 0]

    def by_voice(self, logits_MV: Tensor) -> list[Tensor]:
        """Logits `[V]` of each voice, of all members' rows."""
        size = len(logits_MV) // len(self.voices)
        return [combine_logits(own) for own in logits_MV.split(size)]


class Engine:
    """`submit`, `cancel` and the figures may be used from any thread."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        max_rows: int,
        max_queue: int,
        prefill_tokens: int,
        metrics: Metrics | None = None,
    ) -> None:
        self.backbone = backbone
        self.runner = make_runner(backbone, max_rows)
        self.metrics = metrics or Metrics()
        self._batcher = Batcher(max_rows, max_queue, prefill_tokens)
        self._requests: dict[str, Request] = {}
        self._running: dict[str, _Running] = {}  # touched by the engine's thread only
        self._cancelled: set[str] = set()
        self._ends = stop_ids(backbone)
        self._wake = threading.Condition()  # guards the batcher, requests and cancellations
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ptuning-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    @property
    def rows_in_use(self) -> int:
        return len(self._batcher.rows)

    @property
    def queue_length(self) -> int:
        return len(self._batcher.waiting)

    def submit(self, request: Request) -> None:
        """Queue a request; its events follow through `emit`. Raises QueueFull, ServeError."""
        with self._wake:
            if not self.alive:
                raise ServeError("the engine is not running", fix="restart the service")
            self._batcher.submit(request.id, len(request.prompt), len(request.members))
            self._requests[request.id] = request
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """The client left: the row is free before the next step. No event follows."""
        with self._wake:
            if self._batcher.withdraw(request_id):
                del self._requests[request_id]
            elif self._batcher.state(request_id) is State.RUNNING:
                self._cancelled.add(request_id)
            else:
                return
            self.metrics.add("ptuning_requests_cancelled_total")
            self._wake.notify()

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop after the current step; whoever is running or waiting gets a 503."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while self._wait_for_work():
            self._turn()
        problem = Problem(status=503, message="the service is shutting down", code="shutting_down")
        with self._wake:
            left = list(self._requests.values())
            self._requests.clear()
        for request in left:
            _emit(request, Failed(problem=problem))

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._batcher.busy)
            return not self._closing

    def _turn(self) -> None:
        with self._wake:
            gone, self._cancelled = self._cancelled, set()
        for request_id in gone:
            if request_id in self._running:
                self._leave(request_id)
        with self._wake:
            newcomers = self._batcher.admit()
        if newcomers:
            self._guarded(newcomers, self._prefill)
        if self._batcher.rows:
            self._guarded(self._batcher.rows, self._decode)

    def _guarded(self, ids: Sequence[str], step: Callable[[Sequence[str]], None]) -> None:
        """Run a step; if it fails, its rows fail with it and nobody else."""
        try:
            step(ids)
        except Exception:
            log.exception("a step of %d rows failed", len(ids))
            self.metrics.add("ptuning_step_errors_total")
            for request_id in reversed(dict.fromkeys(ids)):
                self._fail(request_id, "the model failed while it computed this answer")

    def _prefill(self, newcomers: Sequence[str]) -> None:
        requests = [self._requests[request_id] for request_id in dict.fromkeys(newcomers)]
        first = slot = len(self._batcher.rows) - len(newcomers)
        for request in requests:
            self._running[request.id] = self._begin(request)
            for member in request.members:
                self.runner.enter(slot, member)
                slot += 1
        prompts = [request.prompt for request in requests for _ in request.members]
        logits = self.runner.prefill(first, prompts).cpu()
        # Before the first is taken: one that ends moves others.
        slots = self._batcher.slots
        own = [logits[[slot - first for slot in slots[request.id]]] for request in requests]
        for request, logits_MV in zip(requests, own, strict=True):
            now = time.monotonic()
            self.metrics.observe("ptuning_time_to_first_token_seconds", now - request.arrived)
            self.metrics.add("ptuning_prompt_tokens_total", request.prompt_tokens)
            info = request.prefix.info if request.prefix else None
            _emit(request, Started(prefix=info, prompt_tokens=request.prompt_tokens))
            self._take(request.id, logits_MV)

    def _decode(self, ids: Sequence[str]) -> None:
        slots = self._batcher.slots
        tokens, columns = [0] * len(ids), [0] * len(ids)
        for request_id, own in slots.items():
            running = self._running[request_id]
            for place, slot in enumerate(own):
                tokens[slot], columns[slot] = running.voice(place).last, running.column
        logits = self.runner.decode(tokens, columns).cpu()
        self.metrics.observe("ptuning_step_rows", len(ids))
        for request_id, own in slots.items():
            self._running[request_id].column += 1
            self._take(request_id, logits[own])

    def _begin(self, request: Request) -> _Running:
        ready = None if request.prefix is None else request.prefix.ready
        # Of one seed: what differs between voices is their members.
        voices = [
            _Voice(
                text=TextStream(self.backbone.template.decode, request.stop),
                generator=generator_of(request.seed) if request.temperature > 0 else None,
            )
            for _ in range(1 if ready is None else ready.voices)
        ]
        column = len(request.prompt) + (0 if ready is None else ready.length)
        return _Running(request, voices, column)

    def _take(self, request_id: str, logits_MV: Tensor) -> None:
        """Choose the next token of each voice; the request ends with its last voice."""
        running = self._running[request_id]
        try:
            for voice, logits_V in zip(running.voices, running.by_voice(logits_MV), strict=True):
                if voice.reason is None:
                    self._advance(running, voice, logits_V)
        except Exception:
            log.exception("a row failed")
            self._fail(request_id, "this answer could not be decoded")
            return
        if all(voice.reason is not None for voice in running.voices):
            self._leave(request_id)
            _finish(running)

    def _advance(self, running: _Running, voice: _Voice, logits_V: Tensor) -> None:
        """One token more; an only voice is heard as it speaks."""
        request, alone = running.request, len(running.voices) == 1
        token = choose(logits_V, request.temperature, request.top_p, voice.generator)
        voice.last, voice.count = token, voice.count + 1
        voice.log_p += 0.0 if alone else log_probability(logits_V, token)
        self.metrics.add("ptuning_tokens_generated_total")
        ended = token in self._ends
        fresh = "" if ended else voice.text.push(token)
        if ended or voice.text.stopped:
            voice.reason = "stop"
        elif voice.count >= request.max_tokens:
            voice.reason = "length"
        if voice.reason is not None:
            fresh += voice.text.finish()
            voice.reason = "stop" if voice.text.stopped else voice.reason
        if not alone:
            voice.said += fresh
        elif fresh:
            _emit(request, Delta(text=fresh))

    def _fail(self, request_id: str, message: str) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return  # it ended before the step failed
        self._leave(request_id)
        problem = Problem(status=500, message=message, code="engine_error")
        _emit(request, Failed(problem=problem))

    def _leave(self, request_id: str) -> None:
        """The request's slots are cleared and may be filled by the last rows, in the same order
        in which the batcher's books say so."""
        with self._wake:
            moves = self._batcher.release(request_id)
            del self._requests[request_id]
            self._cancelled.discard(request_id)
        self._running.pop(request_id, None)
        for move in moves:
            if move.source == move.target:
                self.runner.leave(move.target)
            else:
                self.runner.move(move.source, move.target)


def _finish(running: _Running) -> None:
    """Say how the answer ended; of several the one that is given, whole, since only now it is
    known which."""
    voices = running.voices
    given = voices[pick_winner([(voice.said, voice.log_p / voice.count) for voice in voices])]
    if len(voices) > 1 and given.said:
        _emit(running.request, Delta(text=given.said))
    assert given.reason is not None
    _emit(running.request, Finished(reason=given.reason, completion_tokens=given.count))


def _emit(request: Request, event: Event) -> None:
    try:
        request.emit(event)
    except Exception:  # noqa: BLE001 - a listener that is gone (its loop closed) stops nobody
        log.debug("nobody listens to a request's events any more")
