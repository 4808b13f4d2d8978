"""A cache of prefix tensors in memory, which are read when a user needs them.

The champions are known in advance (champions.py). Here their files are read, checked and cached by
(user_key, prefix_name, digest), and the least recently used are evicted first. If a prefix cannot
be read, only its user gets an error; neither another user's prefix nor the base model replaces it.

Everything here runs on one event loop; only the files are read in threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ptuning.champions import ChampionList, ChampionRef, Name
from ptuning.errors import ArtifactError
from ptuning.model.backbone import Backbone
from ptuning.prefix.artifact import Prefix
from ptuning.prefix.ready import make_ready
from ptuning.store import Store, prefix_path
from serve.config import ServeConfig
from serve.engine.engine import HeldPrefix
from serve.events import PrefixInfo, Refused
from serve.logs import LOGGER
from serve.metrics import Metrics

log = logging.getLogger(LOGGER)

Loader = Callable[[Name, ChampionRef], HeldPrefix]
T = TypeVar("T")


def file_loader(backbone: Backbone, store: Store) -> Loader:
    """A loader that reads a prefix file of the store, and checks its backbone, user, name and
    digest."""

    def load(name: Name, champion: ChampionRef) -> HeldPrefix:
        user_key, prefix_name = name
        prefix = Prefix.from_bytes(
            store.read(prefix_path(user_key, champion.digest)),
            backbone,
            user_key=user_key,
            prefix_name=prefix_name,
            digest=champion.digest,
        )
        info = PrefixInfo(name=prefix_name, version=champion.version, digest=champion.digest)
        return HeldPrefix(info=info, ready=make_ready(prefix, backbone))

    return load


class PrefixCache:
    """The prefix cache of a replica; requests call `get`."""

    def __init__(
        self,
        champions: ChampionList,
        load: Loader,
        config: ServeConfig,
        *,
        metrics: Metrics | None = None,
    ) -> None:
        self._champions, self._load, self._config = champions, load, config
        self._metrics = metrics or Metrics()
        self._cached: OrderedDict[tuple[str, str, str], HeldPrefix] = OrderedDict()
        self.nbytes = 0
        self._tasks: dict[Hashable, asyncio.Task[Any]] = {}
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="ptuning-prefix")

    async def get(self, user_key: str, prefix_name: str) -> HeldPrefix | None:
        """The user's champion, or None if there is none.

        Raises Refused: 503 if the file cannot be read, 500 if it is not the one published.
        """
        name = (user_key, prefix_name)
        champion = self._champions.get(*name)
        if champion is None:
            return None
        key = (*name, champion.digest)
        cached = self._cached.get(key)
        if cached is not None:
            self._cached.move_to_end(key)
            self._metrics.add("ptuning_prefix_cache_hits_total")
            return cached
        self._metrics.add("ptuning_prefix_cache_misses_total")
        return await self._once(("load", *key), lambda: self._read(name, champion))

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def _read(self, name: Name, champion: ChampionRef) -> HeldPrefix:
        loop = asyncio.get_running_loop()
        try:
            prefix = await loop.run_in_executor(self._readers, self._load, name, champion)
        except Exception as error:
            self._metrics.add("ptuning_prefix_errors_total")
            log.error("prefix %s of user %s: %s", champion.digest, name[0], error)
            if isinstance(error, ArtifactError):
                raise Refused(
                    f"this user's prefix cannot be used: {error.message}",
                    status=500,
                    code="prefix_unusable",
                ) from error
            raise Refused(
                "this user's prefix cannot be read now", status=503, code="prefix_unavailable"
            ) from error
        self._keep((*name, champion.digest), prefix)
        return prefix

    def _keep(self, key: tuple[str, str, str], prefix: HeldPrefix) -> None:
        limit = self._config.prefix_cache_mb * 1_000_000
        if prefix.nbytes > limit:
            return
        self._cached[key] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > limit:
            _, oldest = self._cached.popitem(last=False)
            self.nbytes -= oldest.nbytes

    async def _once(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `work` once for all concurrent callers with the same key; a caller that is cancelled
        does not stop it."""
        task = self._tasks.get(key)
        if task is None:
            task = asyncio.create_task(work())
            self._tasks[key] = task
            task.add_done_callback(lambda done: self._done(key, done))
        return await asyncio.shield(task)

    def _done(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # marks it as retrieved, even if every caller has gone
