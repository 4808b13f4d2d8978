"""From a user to the prefix that answers: champion pointers and prefix tensors in memory.

A pointer (which digest is the user's champion) is trusted for `refresh_seconds`, then the
registry is asked again; while it can't be asked, a champion held before goes on answering
until `max_stale_seconds` after its last confirmation, and everybody else gets a 503: neither
another's prefix nor the base ever stands in for an answer the registry did not give. Tensors
are kept by (user_key, prefix_name, digest), least recently used out first.

Everything here runs on one event loop; only the registry and the file are asked in threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ptuning.errors import ArtifactError
from ptuning.model.backbone import Backbone
from ptuning.prefix.artifact import Prefix
from ptuning.prefix.ready import make_ready
from ptuning.registry.base import Registry, Version
from ptuning.store import read_uri
from serve.config import ServeConfig
from serve.engine.engine import HeldPrefix
from serve.events import PrefixInfo, Refused
from serve.metrics import Metrics

log = logging.getLogger("ptuning.serve")

Name = tuple[str, str]  # user_key, prefix_name
Loader = Callable[[Name, Version], HeldPrefix]
_MAX_POINTERS = 1_000_000
T = TypeVar("T")


@dataclass(frozen=True)
class _Pointer:
    """What the registry said last. Times are on the cache's clock.

    `confirmed` is when it was asked. After a failure it is asked again at `retry_at`, so that a
    registry that hangs does not make every request wait for it.
    """

    version: Version | None
    confirmed: float
    retry_at: float = 0.0


def file_loader(backbone: Backbone, read: Callable[[str], bytes] = read_uri) -> Loader:
    """Reads and checks a prefix file: of this backbone, user, name and digest, or an error."""

    def load(name: Name, version: Version) -> HeldPrefix:
        user_key, prefix_name = name
        prefix = Prefix.from_bytes(
            read(version.uri),
            backbone,
            user_key=user_key,
            prefix_name=prefix_name,
            digest=version.digest,
        )
        ready = make_ready(prefix, backbone)
        info = PrefixInfo(name=prefix_name, version=version.version, digest=version.digest)
        return HeldPrefix(info=info, ready=ready)

    return load


class PrefixCache:
    """`get` is what a request needs; one instance per replica."""

    def __init__(
        self,
        registry: Registry,
        load: Loader,
        config: ServeConfig,
        *,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry, self._load, self._config = registry, load, config
        self._metrics = metrics or Metrics()
        self._clock = clock
        self._pointers: OrderedDict[Name, _Pointer] = OrderedDict()
        self._held: OrderedDict[tuple[str, str, str], HeldPrefix] = OrderedDict()
        self.nbytes = 0
        self._tasks: dict[Hashable, asyncio.Task[Any]] = {}
        # Apart from each other: a registry that hangs must not keep files from being read.
        self._askers = ThreadPoolExecutor(4, thread_name_prefix="ptuning-registry")
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="ptuning-prefix")

    async def get(self, user_key: str, prefix_name: str) -> HeldPrefix | None:
        """The user's champion, or None where the registry says that there is none.

        Raises Refused: 503 where the registry or the file can't be read, 500 where the file
        is not what the registry promises.
        """
        name = (user_key, prefix_name)
        version = await self._champion(name)
        if version is None:
            return None
        key = (*name, version.digest)
        held = self._held.get(key)
        if held is not None:
            self._held.move_to_end(key)
            self._metrics.add("ptuning_prefix_cache_hits_total")
            return held
        self._metrics.add("ptuning_prefix_cache_misses_total")
        return await self._once(("load", *key), lambda: self._read(name, version))

    def close(self) -> None:
        self._askers.shutdown(wait=False, cancel_futures=True)
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def _champion(self, name: Name) -> Version | None:
        pointer, now = self._pointers.get(name), self._clock()
        if pointer and now - pointer.confirmed < self._config.refresh_seconds:
            return pointer.version
        if pointer and pointer.version and now < pointer.retry_at:
            return self._stale(name)
        try:
            return await asyncio.wait_for(
                self._once(("ask", *name), lambda: self._ask(name)),
                self._config.registry_timeout_s,
            )
        except Exception as error:  # noqa: BLE001 - RegistryError, a timeout, a backend's own
            self._metrics.add("ptuning_registry_errors_total")
            log.warning("the registry could not be asked: %s: %s", type(error).__name__, error)
            if pointer is not None and self._pointers.get(name) is pointer:
                retry_at = self._clock() + self._config.refresh_seconds
                self._pointers[name] = replace(pointer, retry_at=retry_at)
            return self._stale(name, error)

    def _stale(self, name: Name, error: Exception | None = None) -> Version:
        """The champion held before, if it was confirmed recently enough."""
        pointer = self._pointers.get(name)
        if pointer is not None and pointer.version is not None:
            age = self._clock() - pointer.confirmed
            if age <= self._config.max_stale_seconds:
                return pointer.version
        raise Refused(
            "which prefix this user has cannot be found out now: the registry does not answer",
            status=503,
            code="registry_unavailable",
        ) from error

    async def _ask(self, name: Name) -> Version | None:
        asked = self._clock()
        loop = asyncio.get_running_loop()
        version = await loop.run_in_executor(self._askers, self._registry.champion, *name)
        self._pointers[name] = _Pointer(version, asked)
        self._pointers.move_to_end(name)
        if len(self._pointers) > _MAX_POINTERS:
            self._pointers.popitem(last=False)
        return version

    async def _read(self, name: Name, version: Version) -> HeldPrefix:
        loop = asyncio.get_running_loop()
        try:
            held = await loop.run_in_executor(self._readers, self._load, name, version)
        except Exception as error:
            self._metrics.add("ptuning_prefix_errors_total")
            log.error("prefix %s of user %s: %s", version.digest, name[0], error)
            if isinstance(error, ArtifactError):
                raise Refused(
                    f"this user's prefix cannot be used: {error.message}",
                    status=500,
                    code="prefix_unusable",
                ) from error
            raise Refused(
                "this user's prefix cannot be read now", status=503, code="prefix_unavailable"
            ) from error
        self._keep((*name, version.digest), held)
        return held

    def _keep(self, key: tuple[str, str, str], held: HeldPrefix) -> None:
        limit = self._config.prefix_cache_mb * 1_000_000
        if held.nbytes > limit:
            return
        self._held[key] = held
        self.nbytes += held.nbytes
        while self.nbytes > limit:
            _, oldest = self._held.popitem(last=False)
            self.nbytes -= oldest.nbytes

    async def _once(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Concurrent callers with one key share one run of `work`; one that leaves stops nobody."""
        task = self._tasks.get(key)
        if task is None:
            task = asyncio.create_task(work())
            self._tasks[key] = task
            task.add_done_callback(lambda done: self._done(key, done))
        return await asyncio.shield(task)

    def _done(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # seen, even where every caller has left
