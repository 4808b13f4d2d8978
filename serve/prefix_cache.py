"""From a user to the prefix that answers: prefix tensors in memory, read when they are wanted.

Who has which champion is known beforehand (champions.py); here the files are read, checked and
kept by (user_key, prefix_name, digest), least recently used out first. A prefix that cannot be
had is an error for its user alone: neither another's prefix nor the base stands in for it.

Everything here runs on one event loop; only files are read in threads.
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
    """Reads and checks a prefix file of the store: of this backbone, user, name and digest, or an
    error."""

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
    """`get` is what a request needs; one instance per replica."""

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
        self._held: OrderedDict[tuple[str, str, str], HeldPrefix] = OrderedDict()
        self.nbytes = 0
        self._tasks: dict[Hashable, asyncio.Task[Any]] = {}
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="ptuning-prefix")

    async def get(self, user_key: str, prefix_name: str) -> HeldPrefix | None:
        """The user's champion, or None where there is none.

        Raises Refused: 503 where the file can't be read, 500 where it is not what was published.
        """
        name = (user_key, prefix_name)
        champion = self._champions.get(*name)
        if champion is None:
            return None
        key = (*name, champion.digest)
        held = self._held.get(key)
        if held is not None:
            self._held.move_to_end(key)
            self._metrics.add("ptuning_prefix_cache_hits_total")
            return held
        self._metrics.add("ptuning_prefix_cache_misses_total")
        return await self._once(("load", *key), lambda: self._read(name, champion))

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def _read(self, name: Name, champion: ChampionRef) -> HeldPrefix:
        loop = asyncio.get_running_loop()
        try:
            held = await loop.run_in_executor(self._readers, self._load, name, champion)
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
        self._keep((*name, champion.digest), held)
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
