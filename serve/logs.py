"""What the service's processes write down, and how it reaches whoever started it.

One line an event, with the request's id and the prefix's digest: never a text, a user or an
exception's message, which may quote one. Replicas are Ray's processes, whose output ends in
files that nobody reads; on one host they append to a file that the starting process follows.
What is traded: across hosts the lines stay in Ray's logs.
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
    """An exception's classes and place, without its message: `KeyError at engine.py:12`."""
    causes: list[str] = []
    at: BaseException | None = error
    while at is not None and len(causes) < 5:
        causes.append(type(at).__name__)
        at = at.__cause__ or at.__context__
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return " from ".join(causes) + place


class _OneLine(logging.Formatter):
    """No tracebacks: they quote messages, and a line is what a reader of logs counts."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text.partition("\n")[0]


def append_to(path: str | None) -> None:
    """Send this process's lines to the file too, each in one write, so that several processes
    may append to it. Does nothing without a path."""
    if path is None:
        return
    try:
        handler = logging.FileHandler(path, mode="a", encoding="utf-8")
    except OSError as error:  # on another host than the one that follows
        logging.getLogger(LOGGER).warning("no lines go to %s: %s", path, error.strerror)
        return
    handler.setFormatter(_OneLine(_FORMAT))
    logging.getLogger(LOGGER).addHandler(handler)


class Follower:
    """The lines that others have appended to a file since the last look."""

    def __init__(self, path: str) -> None:
        Path(path).touch()
        self._file: TextIO = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115
        self._part = ""

    def lines(self) -> Iterator[str]:
        """Whole lines only; the beginning of one waits for its end."""
        *whole, self._part = (self._part + self._file.read()).split("\n")
        yield from whole

    def close(self) -> None:
        self._file.close()
