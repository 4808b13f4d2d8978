"""Continuous batching: one thread owns the model, requests join and leave between steps.

A turn of the loop: drop those whose client left, prefill the newcomers together, then one
decoding step for every running row, each with its own user's prefix. What to do is decided
by `Batcher`; tensors are moved by `SlotRunner`. A failing step fails the rows in it, and the
loop goes on.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptuning.backbone import Backbone
from ptuning.errors import ServeError
from serve.batcher import Batcher, State
from serve.events import Delta, Event, Failed, Finished, FinishReason, PrefixInfo, Problem, Started
from serve.metrics import Metrics
from serve.runner import SlotRunner
from serve.sampling import choose, generator_of
from serve.text import TextStream

log = logging.getLogger("ptuning.serve")


@dataclass(frozen=True, kw_only=True)
class HeldPrefix:
    """A user's prefix ready for use: `kv` is `[L, 2, H, P, D]` in the backbone's dtype."""

    info: PrefixInfo
    kv: Tensor

    @property
    def num_virtual_tokens(self) -> int:
        return int(self.kv.shape[-2])

    @property
    def nbytes(self) -> int:
        return self.kv.numel() * self.kv.element_size()


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row to be. `emit` is called in the engine's thread and must not block."""

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


@dataclass
class _Row:
    """A running request: where its next token goes, and what it has said."""

    request: Request
    text: TextStream
    generator: torch.Generator | None
    column: int  # of the next token: P + prompt + generated tokens before it
    last: int = 0
    count: int = 0


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
        self.runner = SlotRunner(backbone, max_rows)
        self.metrics = metrics or Metrics()
        self._batcher = Batcher(max_rows, max_queue, prefill_tokens)
        self._requests: dict[str, Request] = {}
        self._rows: dict[str, _Row] = {}  # touched by the engine's thread only
        self._cancelled: set[str] = set()
        self._ends = _end_tokens(backbone)
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
            self._batcher.submit(request.id, len(request.prompt))
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
            if request_id in self._rows:
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
            for request_id in reversed(ids):
                self._fail(request_id, "the model failed while it computed this answer")

    def _prefill(self, newcomers: Sequence[str]) -> None:
        requests = [self._requests[request_id] for request_id in newcomers]
        first = len(self._batcher.rows) - len(newcomers)
        for slot, request in enumerate(requests, first):
            self._rows[request.id] = self._row(request)
            self.runner.enter(slot, request.prefix.kv if request.prefix else None)
        logits = self.runner.prefill(first, [request.prompt for request in requests])
        for request, logits_V in zip(requests, logits.cpu(), strict=True):
            now = time.monotonic()
            self.metrics.observe("ptuning_time_to_first_token_seconds", now - request.arrived)
            self.metrics.add("ptuning_prompt_tokens_total", len(request.prompt))
            info = request.prefix.info if request.prefix else None
            _emit(request, Started(prefix=info, prompt_tokens=len(request.prompt)))
            self._take(request.id, logits_V)

    def _decode(self, ids: Sequence[str]) -> None:
        rows = [self._rows[request_id] for request_id in ids]
        logits = self.runner.decode([row.last for row in rows], [row.column for row in rows])
        self.metrics.observe("ptuning_step_rows", len(rows))
        for row, logits_V in zip(rows, logits.cpu(), strict=True):
            row.column += 1
            self._take(row.request.id, logits_V)

    def _row(self, request: Request) -> _Row:
        offset = request.prefix.num_virtual_tokens if request.prefix else 0
        return _Row(
            request=request,
            text=TextStream(self.backbone.template.decode, request.stop),
            generator=generator_of(request.seed) if request.temperature > 0 else None,
            column=offset + len(request.prompt),
        )

    def _take(self, request_id: str, logits_V: Tensor) -> None:
        """Choose the row's next token and say what it adds; the row may end here."""
        try:
            reason = self._advance(self._rows[request_id], logits_V)
        except Exception:
            log.exception("a row failed")
            self._fail(request_id, "this answer could not be decoded")
            return
        if reason is not None:
            row = self._rows[request_id]
            self._leave(request_id)
            _emit(row.request, Finished(reason=reason, completion_tokens=row.count))

    def _advance(self, row: _Row, logits_V: Tensor) -> FinishReason | None:
        request = row.request
        if not math.isfinite(float(logits_V.max())):  # NaN wins a maximum
            raise ServeError("the model's logits are not finite", seen=float(logits_V.max()))
        token = choose(logits_V, request.temperature, request.top_p, row.generator)
        row.last, row.count = token, row.count + 1
        self.metrics.add("ptuning_tokens_generated_total")
        ended = token in self._ends
        fresh = "" if ended else row.text.push(token)
        reason: FinishReason | None = None
        if ended or row.text.stopped:
            reason = "stop"
        elif row.count >= request.max_tokens:
            reason = "length"
        if reason is not None:
            fresh += row.text.finish()
            reason = "stop" if row.text.stopped else reason
        if fresh:
            _emit(request, Delta(text=fresh))
        return reason

    def _fail(self, request_id: str, message: str) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return  # it ended before the step failed
        self._leave(request_id)
        problem = Problem(status=500, message=message, code="engine_error")
        _emit(request, Failed(problem=problem))

    def _leave(self, request_id: str) -> None:
        """The row's slot is cleared and may be filled by the last row, in the same order in
        which the batcher's books say so."""
        slot = self._batcher.rows.index(request_id)
        with self._wake:
            move = self._batcher.release(request_id)
            del self._requests[request_id]
            self._cancelled.discard(request_id)
        self._rows.pop(request_id, None)
        if move is None:
            self.runner.leave(slot)
        else:
            self.runner.move(move.source, move.target)


def _emit(request: Request, event: Event) -> None:
    try:
        request.emit(event)
    except Exception:  # noqa: BLE001 - a listener that is gone (its loop closed) stops nobody
        log.debug("nobody listens to a request's events any more")


def _end_tokens(backbone: Backbone) -> frozenset[int]:
    """The template's end token and whatever the model's files call an end."""
    ends: set[int] = {backbone.template.end_token_id}
    model = backbone.model
    for holder in (getattr(model, "generation_config", None), model.config):
        token = getattr(holder, "eos_token_id", None)
        if token is not None:
            ends.update(token if isinstance(token, list) else [token])
    return frozenset(int(token) for token in ends)
