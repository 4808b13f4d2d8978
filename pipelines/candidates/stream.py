"""Register packs as they are committed, behind the training of the others."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from ptuning.errors import PTuningError, RegistryUnreachable

_Pack = TypeVar("_Pack")
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0


class RegistrationStream(Generic[_Pack]):
    """Calls `register` with one pack after another, in a thread of its own.

    A registry that does not answer is asked again, less and less often, for at most `patience_s`
    seconds; `note` is called with a line when it stops to answer and when it answers again. Any
    other error ends the stream, and `finish` raises it: training goes on until then.

        with RegistrationStream(register, patience_s=600, note=print) as stream:
            stream.add(pack)
            stream.finish(progress)
    """

    def __init__(
        self, register: Callable[[_Pack], int], *, patience_s: float, note: Callable[[str], None]
    ) -> None:
        self._register, self._patience_s, self._note = register, patience_s, note
        self._packs: queue.Queue[_Pack | None] = queue.Queue()
        self._stopped = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="registration", daemon=True)
        self.users = 0  # registered so far
        self.seconds = 0.0  # at work, without waiting for packs

    def __enter__(self) -> RegistrationStream[_Pack]:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """After an error of ours, what was committed is still registered; else stop at once."""
        if not isinstance(error, PTuningError):
            self._stopped.set()
        self._packs.put(None)
        self._thread.join()

    def add(self, pack: _Pack) -> None:
        """Register this pack when its turn comes."""
        self._packs.put(pack)

    def finish(self, progress: Callable[[int, int], None]) -> None:
        """Wait until all packs are registered, and tell `progress` how many users are. Raises what
        ended the stream."""
        self._packs.put(None)
        while self._thread.is_alive():
            self._thread.join(0.2)
            progress(self.users, 0)
        progress(self.users, 0)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (pack := self._packs.get()) is not None and not self._stopped.is_set():
            began = time.monotonic()
            try:
                self.users += self._patiently(pack)
            except Exception as error:  # noqa: BLE001 raised by `finish`, in the driver's thread
                self._error = error
                return
            finally:
                self.seconds += time.monotonic() - began

    def _patiently(self, pack: _Pack) -> int:
        began, wait, told = time.monotonic(), _FIRST_WAIT_S, False
        while True:
            try:
                users = self._register(pack)
            except RegistryUnreachable as error:
                left = self._patience_s - (time.monotonic() - began)
                if left <= 0:
                    raise
                if not told:
                    self._note(f"{error.message}; trying again for {self._patience_s:g} s")
                    told = True
                if self._stopped.wait(min(wait, left)):
                    raise
                wait = min(2 * wait, _LONGEST_WAIT_S)
                continue
            if told:
                self._note("the registry answers again")
            return users
