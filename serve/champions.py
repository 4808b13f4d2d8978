"""A replica's list of champions, polled by a thread so that no request waits for the store.

The registry is not involved: the service uses what was published to the store. While the store
cannot be read, the last list stays in use, and a metric shows its age.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable

from ptuning.champions import ChampionList, acknowledge, withdraw
from ptuning.store import Store
from serve.logs import LOGGER, describe
from serve.metrics import Metrics

log = logging.getLogger(LOGGER)

_BEAT_POLLS = 15  # polls between signs of life from a replica


class ChampionPoller:
    """Refreshes a ChampionList, and records in the store which generation this replica serves.

    The constructor reads the list once, so a replica that cannot read the store does not start.
    `close` withdraws the acknowledgement.
    """

    def __init__(
        self,
        store: Store,
        fingerprint: str,
        refresh_seconds: float,
        *,
        metrics: Metrics,
        replica: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.champions = ChampionList(store, fingerprint)
        self._store, self._fingerprint = store, fingerprint
        self._metrics, self._clock = metrics, clock
        self._replica = replica or f"replica-{secrets.token_hex(8)}"
        self._acknowledged, self._beat = -1, 0
        self._failing = False
        self.champions.refresh()
        self._confirmed = clock()
        self._acknowledge()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(refresh_seconds,), name="ptuning-champions", daemon=True
        )
        self._thread.start()

    @property
    def age_s(self) -> float:
        """Seconds since the list was last known to be current."""
        return self._clock() - self._confirmed

    def poll(self) -> None:
        """Poll once. A failure is logged only once, until polling works again."""
        try:
            self.champions.refresh()
            self._confirmed = self._clock()
            self._acknowledge()
        except Exception as error:  # noqa: BLE001 - on any error the last list stays in use
            self._metrics.add("ptuning_champions_errors_total")
            if not self._failing:
                log.warning("the list of champions cannot be read: %s", describe(error))
            self._failing = True
        else:
            if self._failing:
                log.warning("the list of champions can be read again")
            self._failing = False

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        try:
            withdraw(self._store, self._fingerprint, self._replica)
        except Exception as error:  # noqa: BLE001 - the replica stops anyway
            log.warning("the replica could not withdraw its acknowledgement: %s", describe(error))

    def _run(self, refresh_seconds: float) -> None:
        while not self._stop.wait(refresh_seconds):
            self.poll()

    def _acknowledge(self) -> None:
        self._beat += 1
        generation = self.champions.generation
        if generation != self._acknowledged or self._beat % _BEAT_POLLS == 0:
            acknowledge(self._store, self._fingerprint, self._replica, generation, self._beat)
            self._acknowledged = generation
