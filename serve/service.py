"""A replica's work, without Ray: from a validated request to its events.

It encodes the prompt as in training, finds the user's champion, submits both to the engine and
forwards its events. If the client disconnects, the generator is closed, which frees the row. Every
failure is an event, so that no client waits in vain.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence

from ptuning.errors import DataError, ServeError
from ptuning.model.backbone import Backbone
from ptuning.prefix.ready import check_positions
from ptuning.store import Store
from serve.champions import ChampionPoller
from serve.config import ServeConfig
from serve.engine.batcher import QueueFull
from serve.engine.encoders import Encoders
from serve.engine.engine import Engine, HeldPrefix, Request
from serve.events import (
    Answer,
    Ask,
    Delta,
    Event,
    Failed,
    Finished,
    Problem,
    Refused,
    Started,
    too_long,
)
from serve.logs import LOGGER, describe
from serve.metrics import ENGINE_FAMILIES, Metrics, Snapshot
from serve.prefix_cache import PrefixCache, file_loader

log = logging.getLogger(LOGGER)


class Service:
    """A backbone with its engine and prefix cache. Use from one event loop."""

    def __init__(self, config: ServeConfig, backbone: Backbone, store: Store) -> None:
        self.config, self.backbone = config, backbone
        self.metrics = Metrics()
        self.poller = ChampionPoller(
            store, backbone.fingerprint, config.refresh_seconds, metrics=self.metrics
        )
        self.prefixes = PrefixCache(
            self.poller.champions, file_loader(backbone, store), config, metrics=self.metrics
        )
        self.engine = Engine(
            backbone,
            max_rows=config.max_rows,
            max_queue=config.max_queue,
            prefill_tokens=config.prefill_tokens,
            metrics=self.metrics,
        )
        self._encoders = Encoders(backbone.template, config.encoders)
        self._longest_token = max(len(token) for token in backbone.tokenizer.get_vocab())

    async def stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """The request's events: Started, Deltas, Finished; or at any point Failed."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.request_timeout_s
        events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            async with asyncio.timeout_at(deadline):
                prompt = await self._encode(ask)
                prefix = await self._prefix(ask)
            if prefix is not None:
                prompt = tuple(prefix.ready.arrangement.prompt(prompt))
            self._check_positions(ask, prompt, prefix)
            self.engine.submit(_request(ask, prompt, prefix, emit))
            while True:
                async with asyncio.timeout_at(deadline):
                    event = await events.get()
                yield event
                if isinstance(event, Finished | Failed):
                    return
        except Refused as error:
            yield Failed(problem=error.problem)
        except QueueFull as error:
            yield Failed(problem=Problem(status=429, message=str(error), code="queue_full"))
        except TimeoutError:
            limit = f"{self.config.request_timeout_s:g} s"
            message = f"the answer was not complete within {limit}"
            yield Failed(problem=Problem(status=504, message=message, code="timeout"))
        except ServeError as error:
            yield Failed(problem=Problem(status=503, message=str(error), code="not_running"))
        except Exception as error:
            log.error("request %s: %s", ask.id, describe(error))
            log.debug("how it failed", exc_info=True)
            yield Failed(problem=Problem(status=500, message="internal error", code=None))
        finally:
            self.engine.cancel(ask.id)

    async def answer(self, ask: Ask) -> Answer | Failed:
        """Collect a request's events into one value."""
        started: Started | None = None
        texts: list[str] = []
        events = self.stream(ask)
        try:
            async for event in events:
                if isinstance(event, Failed):
                    return event
                if isinstance(event, Started):
                    started = event
                elif isinstance(event, Delta):
                    texts.append(event.text)
                elif started is not None:
                    return Answer(
                        prefix=started.prefix,
                        text="".join(texts),
                        reason=event.reason,
                        prompt_tokens=started.prompt_tokens,
                        completion_tokens=event.completion_tokens,
                    )
        finally:
            await events.aclose()
        return Failed(problem=Problem(status=500, message="the answer is incomplete", code=None))

    def report(self, replica: str) -> Snapshot:
        """This replica's current metrics. Raises ServeError if the engine is not running."""
        if not self.engine.alive:
            raise ServeError("the engine is not running", fix="restart the service")
        gauges = {
            "ptuning_rows_in_use": float(self.engine.rows_in_use),
            "ptuning_rows_limit": float(self.config.max_rows),
            "ptuning_queue_length": float(self.engine.queue_length),
            "ptuning_prefix_cache_bytes": float(self.prefixes.nbytes),
            "ptuning_champions_generation": float(self.poller.champions.generation),
            "ptuning_champions_age_seconds": self.poller.age_s,
        }
        return self.metrics.snapshot(gauges, ENGINE_FAMILIES, replica=replica)

    def close(self) -> None:
        self.engine.close()
        self.prefixes.close()
        self.poller.close()
        self._encoders.close()

    async def _encode(self, ask: Ask) -> tuple[int, ...]:
        """The ids of the full prompt, without cutting. Raises Refused (400)."""
        param = "prompt" if isinstance(ask.prompt, str) else "messages"
        texts = [ask.prompt] if isinstance(ask.prompt, str) else [m.content for m in ask.prompt]
        # Each message needs at least one token of the template, and the longest token bounds how
        # much text a token covers. So much too long prompts are refused without the tokenizer.
        turns = 0 if isinstance(ask.prompt, str) else len(ask.prompt)
        at_least = turns + sum(map(len, texts)) // self._longest_token
        if at_least > self.config.max_length:
            raise too_long(f"at least {at_least}", self.config.max_length, param)
        try:
            ids = await self._encoders.encode(ask.prompt)
        except DataError as error:
            raise Refused(str(error), status=400, param=param) from error
        if not ids:
            raise Refused("the prompt has no tokens", status=400, param=param)
        if len(ids) > self.config.max_length:
            raise too_long(str(len(ids)), self.config.max_length, param)
        self._check_vocabulary(ids, param)
        return tuple(ids)

    def _check_vocabulary(self, ids: Sequence[int], param: str) -> None:
        """Raise Refused for a token that the tokenizer has but the model does not. It would fail
        the other rows of its step and, on a GPU, all later requests."""
        size = self.backbone.facts.vocab_size
        if max(ids) >= size:
            raise Refused(
                f"the prompt has a token that this model does not know: id {max(ids)}, but the "
                f"model has {size} tokens",
                status=400,
                code="unknown_token",
                param=param,
            )

    async def _prefix(self, ask: Ask) -> HeldPrefix | None:
        """The user's champion, or None if by policy the base model answers. Raises Refused."""
        base_answers = self.config.unknown_user == "base"
        if ask.user_key is None:
            if base_answers:
                return None
            raise Refused("the request names no user", status=400, param="user")
        prefix = await self.prefixes.get(ask.user_key, ask.prefix_name)
        if prefix is not None and len(prefix.ready.members) > self.config.max_rows:
            raise Refused(
                f"this user's prefix is an ensemble of {len(prefix.ready.members)}, but a replica "
                f"decodes {self.config.max_rows} rows together (serve.max_rows)",
                status=500,
                code="prefix_unusable",
            )
        if prefix is None and not base_answers:
            raise Refused(
                "this user has no prefix with that name",
                status=404,
                code="user_not_found",
                param="user",
            )
        return prefix

    def _check_positions(
        self, ask: Ask, prompt: tuple[int, ...], prefix: HeldPrefix | None
    ) -> None:
        """Raise Refused if the request, with virtual tokens and answer, exceeds the model's
        positions."""
        try:
            ready = prefix.ready if prefix else None
            check_positions(self.backbone, ready, prompt, ask.max_tokens)
        except DataError as error:
            raise Refused(
                str(error), status=400, code="context_length_exceeded", param="max_tokens"
            ) from error


def _request(
    ask: Ask,
    prompt: tuple[int, ...],
    prefix: HeldPrefix | None,
    emit: Callable[[Event], None],
) -> Request:
    return Request(
        id=ask.id,
        prompt=prompt,
        prefix=prefix,
        max_tokens=ask.max_tokens,
        temperature=ask.temperature,
        top_p=ask.top_p,
        seed=secrets.randbits(63) if ask.seed is None else ask.seed,
        stop=ask.stop,
        emit=emit,
    )
