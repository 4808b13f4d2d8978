"""Register packs as they are committed, behind the training of the others."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from ptuning.errors import PTuningError, RegistryUnreachable

_Pack = TypeVar("_Pack")
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0
_LONGEST_CALL_S = 5.0  # that is waited for when somebody stops the run


class RegistrationStream(Generic[_Pack]):
    """Calls `register` with one pack after another, in a thread of its own.

    A registry that does not answer is asked again, less and less often. After `patience_s` seconds
    the thread ends, and packs wait; `finish`, or the end of the block after an error of ours, tries
    them once more. Any other error of `register` ends the stream for good. `note` is called with a
    line whenever something changes, since training goes on meanwhile; `finish` raises what is left.

        with RegistrationStream(register, patience_s=600, note=print) as stream:
            stream.add(pack)
            stream.finish(progress)
    """

    def __init__(
        self, register: Callable[[_Pack], int], *, patience_s: float, note: Callable[[str], None]
    ) -> None:
        self._register, self._patience_s, self._note = register, patience_s, note
        self._packs: queue.Queue[_Pack | None] = queue.Queue()
        self._waiting: _Pack | None = None  # its registration was given up for now
        self._stopped = threading.Event()
        self._error: Exception | None = None
        self.users = 0  # registered so far
        self.seconds = 0.0  # at work, without waiting for packs
        self._thread = self._start()

    def __enter__(self) -> RegistrationStream[_Pack]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """After an error of ours, what was committed is still registered; else stop at once."""
        if isinstance(error, PTuningError) and self._error is not error:
            with contextlib.suppress(Exception):  # noted already, and less of a reason than `error`
                self.finish(lambda *_: None)
            return
        self._stopped.set()
        self._packs.put(None)
        self._thread.join(_LONGEST_CALL_S)  # a call that hangs must not hold up Ctrl-C

    def add(self, pack: _Pack) -> None:
        """Register this pack when its turn comes."""
        self._packs.put(pack)

    def finish(self, progress: Callable[[int, int], None]) -> None:
        """Wait until all packs are registered, and tell `progress` how many users are. Raises what
        ended the stream."""
        self._packs.put(None)
        self._wait(progress)
        if isinstance(self._error, RegistryUnreachable):
            self._error = None
            self._thread = self._start()
            self._wait(progress)
        if self._error is not None:
            raise self._error

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="registration", daemon=True)
        thread.start()
        return thread

    def _wait(self, progress: Callable[[int, int], None]) -> None:
        while self._thread.is_alive():
            self._thread.join(0.2)
            progress(self.users, 0)
        progress(self.users, 0)

    def _run(self) -> None:
        pack, self._waiting = self._waiting, None
        while not self._stopped.is_set():
            if pack is None and (pack := self._packs.get()) is None:
                return
            began = time.monotonic()
            try:
                self.users += self._patiently(pack)
            except Exception as error:  # noqa: BLE001 raised by `finish`, in the driver's thread
                if not self._stopped.is_set():
                    self._note(f"registration stopped: {error}")
                self._error, self._waiting = error, pack
                return
            finally:
                self.seconds += time.monotonic() - began
            pack = None

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
