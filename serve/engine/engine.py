"""Continuous batching: one thread owns the model, and requests join and leave between steps.

One iteration of the loop drops requests whose client has disconnected, prefills the new requests
together, and does one decoding step for all running rows, each with its user's prefix. `Batcher`
decides what to do, and `SlotRunner` moves tensors. A failing step fails its rows, and the loop
continues. A slot in an unknown state ends the loop, and all requests fail.
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
from serve.logs import describe
from serve.metrics import Metrics

log = logging.getLogger("ptuning.serve")


CANCELLED = Problem(status=499, message="the client left", code="cancelled")
SHUTTING_DOWN = Problem(status=503, message="the service is shutting down", code="shutting_down")
DIED = Problem(status=503, message="the engine has stopped; try again", code="engine_stopped")


class _SlotLost(ServeError):
    """The contents of a slot are unknown."""


@dataclass(frozen=True, kw_only=True)
class HeldPrefix:
    """A user's prefix in memory, ready for the model, with its description for the answer."""

    info: PrefixInfo
    ready: ReadyPrefix

    @property
    def nbytes(self) -> int:
        return self.ready.nbytes


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request to the engine. `prompt` includes the prefix's virtual tokens and anchor tokens, if
    any. `emit` is called in the engine's thread, or in the thread that cancels or closes, and must
    not block."""

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
        """The ensemble's prefixes, one row each."""
        return (None,) if self.prefix is None else self.prefix.ready.members

    @property
    def name(self) -> str:
        """The name in log lines: the id and the prefix's digest, never a text or a user."""
        return f"{self.id} (prefix {self.prefix.info.digest if self.prefix else 'base'})"

    @property
    def prompt_tokens(self) -> int:
        """Real tokens of the prompt."""
        return sum(token >= 0 for token in self.prompt)


@dataclass
class _Voice:
    """One answer being generated: its text so far, and its last token."""

    text: TextStream
    generator: torch.Generator | None
    last: int = 0
    count: int = 0
    answer: str = ""  # kept only if answers are compared
    log_p: float = 0.0  # of its tokens; summed only if answers are compared
    reason: FinishReason | None = None  # why it ended


@dataclass
class _Running:
    """A request in the batch. It has one voice, or one per member of an ensemble that votes, and
    the column of the next tokens."""

    request: Request
    voices: list[_Voice]
    column: int  # P + prompt + tokens generated so far

    def voice(self, index: int) -> _Voice:
        """The voice whose tokens the request's row `index` reads."""
        return self.voices[index if len(self.voices) > 1 else 0]

    def by_voice(self, logits_MV: Tensor) -> list[Tensor]:
        """Combine the rows' logits into logits `[V]` for each voice."""
        size = len(logits_MV) // len(self.voices)
        return [combine_logits(part_MV) for part_MV in logits_MV.split(size)]


class Engine:
    """The engine; `submit`, `cancel` and the properties may be used from any thread.

    Every submitted request gets exactly one last event, `Finished` or `Failed`, whatever happens to
    its client, its step or the engine's thread. If a slot cannot be cleared or moved, the engine
    ends, because it is no longer known which row has whose keys and values.
    """

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
        self._requests: dict[str, Request] = {}  # those without their last event
        self._running: dict[str, _Running] = {}  # used only by the engine's thread
        self._cancelled: set[str] = set()
        self._ends = stop_ids(backbone)
        # Guards the batcher, the requests, the cancellations and `_stopping`.
        self._wake = threading.Condition()
        self._stopping: Problem | None = None
        self._thread = threading.Thread(target=self._run, name="ptuning-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._stopping is None

    @property
    def rows_in_use(self) -> int:
        return len(self._batcher.rows)

    @property
    def queue_length(self) -> int:
        return len(self._batcher.waiting)

    def submit(self, request: Request) -> None:
        """Queue a request, whose events are passed to `emit`. Raises QueueFull or ServeError."""
        with self._wake:
            if not self.alive:
                raise ServeError("the engine is not running", fix="restart the service")
            self._batcher.submit(request.id, len(request.prompt), len(request.members))
            self._requests[request.id] = request
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """Cancel a request whose client has gone: it fails, and its rows are free before the next
        step."""
        with self._wake:
            waited = self._batcher.withdraw(request_id)
            if not waited:
                if self._batcher.state(request_id) is not State.RUNNING:
                    return
                self._cancelled.add(request_id)
                self._wake.notify()
        self.metrics.add("ptuning_requests_cancelled_total")
        if waited:
            self._end(request_id, Failed(problem=CANCELLED))

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop after the current step. All remaining requests fail with 503, after `timeout_s` at
        the latest, even if the step never ends."""
        with self._wake:
            self._stopping = self._stopping or SHUTTING_DOWN
            self._wake.notify()
        self._thread.join(timeout_s)
        self._end_all(SHUTTING_DOWN)

    def _run(self) -> None:
        problem = DIED
        try:
            while self._wait_for_work():
                self._turn()
            problem = SHUTTING_DOWN
        except BaseException as error:
            self.metrics.add("ptuning_engine_deaths_total")
            log.critical("the engine has died: %s", describe(error))
            log.debug("how it died", exc_info=True)
        finally:
            self._end_all(problem)

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._batcher.busy)
            return self._stopping is None

    def _turn(self) -> None:
        with self._wake:
            gone, self._cancelled = self._cancelled, set()
        for request_id in gone:
            if request_id in self._running:
                self._leave(request_id, Failed(problem=CANCELLED))
        with self._wake:
            newcomers = self._batcher.admit()
        if newcomers:
            self._guard(newcomers, self._prefill)
        if self._batcher.rows:
            self._guard(self._batcher.rows, self._decode)

    def _guard(self, ids: Sequence[str], step: Callable[[Sequence[str]], None]) -> None:
        """Run a step; if it fails, only its requests fail."""
        try:
            step(ids)
        except _SlotLost:
            raise
        except Exception as error:
            self.metrics.add("ptuning_step_errors_total")
            log.debug("how it failed", exc_info=True)
            for request_id in reversed(dict.fromkeys(ids)):
                if request := self._requests.get(request_id):
                    log.error("request %s: its step failed: %s", request.name, describe(error))
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
        # Collected before the first `_take`: a request that ends moves other rows.
        slots = self._batcher.slots
        parts = [logits[[slot - first for slot in slots[request.id]]] for request in requests]
        for request, logits_MV in zip(requests, parts, strict=True):
            now = time.monotonic()
            self.metrics.observe("ptuning_time_to_first_token_seconds", now - request.arrived)
            self.metrics.add("ptuning_prompt_tokens_total", request.prompt_tokens)
            info = request.prefix.info if request.prefix else None
            self._say(request, Started(prefix=info, prompt_tokens=request.prompt_tokens))
            self._take(request.id, logits_MV)

    def _decode(self, ids: Sequence[str]) -> None:
        slots = self._batcher.slots
        tokens, columns = [0] * len(ids), [0] * len(ids)
        for request_id, rows in slots.items():
            running = self._running[request_id]
            for index, slot in enumerate(rows):
                tokens[slot], columns[slot] = running.voice(index).last, running.column
        logits = self.runner.decode(tokens, columns).cpu()
        self.metrics.observe("ptuning_step_rows", len(ids))
        for request_id, rows in slots.items():
            self._running[request_id].column += 1
            self._take(request_id, logits[rows])

    def _begin(self, request: Request) -> _Running:
        ready = None if request.prefix is None else request.prefix.ready
        # All voices have the same seed: they differ only in their members.
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
        """Choose the next token of each voice; the request ends when all its voices have."""
        running = self._running[request_id]
        try:
            for voice, logits_V in zip(running.voices, running.by_voice(logits_MV), strict=True):
                if voice.reason is None:
                    self._advance(running, voice, logits_V)
            if any(voice.reason is None for voice in running.voices):
                return
            text, finished = _finish(running)
        except Exception as error:
            self.metrics.add("ptuning_row_errors_total")
            log.error("request %s: a row failed: %s", running.request.name, describe(error))
            log.debug("how it failed", exc_info=True)
            self._fail(request_id, "this answer could not be decoded")
            return
        if text:
            self._say(running.request, Delta(text=text))
        self._leave(request_id, finished)

    def _advance(self, running: _Running, voice: _Voice, logits_V: Tensor) -> None:
        """Add a token to a voice; if it is the only one, its text is streamed."""
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
            voice.answer += fresh
        elif fresh:
            self._say(request, Delta(text=fresh))

    def _fail(self, request_id: str, message: str) -> None:
        with self._wake:
            running = self._batcher.state(request_id) is State.RUNNING
        if running:  # otherwise it ended before the step failed
            problem = Problem(status=500, message=message, code="engine_error")
            self._leave(request_id, Failed(problem=problem))

    def _leave(self, request_id: str, last: Finished | Failed) -> None:
        """End a running request: clear its slots or move other rows there, in the order that the
        batcher gives. The last event is sent even if that fails."""
        with self._wake:
            moves = self._batcher.release(request_id)
            self._cancelled.discard(request_id)
        self._running.pop(request_id, None)
        try:
            for move in moves:
                if move.source == move.target:
                    self.runner.leave(move.target)
                else:
                    self.runner.move(move.source, move.target)
        except Exception as error:
            raise _SlotLost("a slot could not be cleared or moved") from error
        finally:
            self._end(request_id, last)

    def _say(self, request: Request, event: Event) -> None:
        """Send an event that is not the last, unless the request has ended. If its listener is
        gone, cancel it."""
        with self._wake:
            if request.id not in self._requests:
                return
        if not _emit(request, event):
            self.cancel(request.id)

    def _end(self, request_id: str, last: Finished | Failed) -> None:
        """Send a request's last event, once."""
        with self._wake:
            request = self._requests.pop(request_id, None)
        if request is not None:
            _emit(request, last)

    def _end_all(self, problem: Problem) -> None:
        """Accept no more requests, and fail all those that have not ended."""
        with self._wake:
            self._stopping = self._stopping or problem
            left = list(self._requests)
        for request_id in left:
            self._end(request_id, Failed(problem=problem))


def _finish(running: _Running) -> tuple[str, Finished]:
    """The last event and, if there were several voices, the full text of the winner, which is
    known only now."""
    voices = running.voices
    winner = voices[pick_winner([(voice.answer, voice.log_p / voice.count) for voice in voices])]
    assert winner.reason is not None
    finished = Finished(reason=winner.reason, completion_tokens=winner.count)
    return winner.answer if len(voices) > 1 else "", finished


def _emit(request: Request, event: Event) -> bool:
    """Send an event; returns False if nobody listens any more (the event loop is closed)."""
    try:
        request.emit(event)
    except Exception:  # noqa: BLE001
        log.debug("nobody listens to request %s any more", request.name)
        return False
    return True
