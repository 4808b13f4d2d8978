"""The log lines of the service's processes, and how they reach the process that started it.

There is one line per event, with the request's id and the prefix's digest, but never a text, a user
or an exception's message, which may quote one. Replicas are Ray processes, whose output goes to
files that nobody reads. On one host they append to a file that the starting process follows. The
trade-off: on several hosts the lines stay in Ray's logs.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

LOGGER = "ptuning.serve"
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def describe(error: BaseException) -> str:
    """An exception's class, causes and location, without messages: `KeyError at engine.py:12`."""
    causes: list[str] = []
    at: BaseException | None = error
    while at is not None and len(causes) < 5:
        causes.append(type(at).__name__)
        at = at.__cause__ or at.__context__
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return " from ".join(causes) + place


class _OneLine(logging.Formatter):
    """Formats without tracebacks, which may quote messages, so that each event is one line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text.partition("\n")[0]


def append_to(path: str | None) -> None:
    """Append this process's lines to the file too, each in a single write, so that several
    processes can share it. Does nothing without a path."""
    if path is None:
        return
    try:
        handler = logging.FileHandler(path, mode="a", encoding="utf-8")
    except OSError as error:  # on another host than the process that follows the file
        logging.getLogger(LOGGER).warning("no lines go to %s: %s", path, error.strerror)
        return
    handler.setFormatter(_OneLine(_FORMAT))
    logging.getLogger(LOGGER).addHandler(handler)


class Follower:
    """Reads the lines that other processes append to a file."""

    def __init__(self, path: str) -> None:
        Path(path).touch()
        self._file: TextIO = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115
        self._part = ""

    def lines(self) -> Iterator[str]:
        """The complete lines since the last call; an incomplete line waits for its end."""
        *complete, self._part = (self._part + self._file.read()).split("\n")
        yield from complete

    def close(self) -> None:
        self._file.close()
