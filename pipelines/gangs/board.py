"""How far a gang is: its workers count on a board, the driver's progress bar reads it.

Counts are for people's eyes. What is done is read from done-records.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ray

TICK_S = 0.5  # how often a worker reports tokens, and the driver looks

Progress = Callable[[int, int], None]  # users trained, tokens trained


class Board:
    """Users and tokens of the gang in progress; an actor (`start_board`). Users are counted by
    pack: one that is trained again after a worker's death counts once."""

    def __init__(self) -> None:
        self._users: dict[str, int] = {}
        self._tokens = 0

    def set_users(self, pack_id: str, users: int) -> None:
        self._users[pack_id] = users

    def add_tokens(self, tokens: int) -> None:
        self._tokens += tokens

    def read(self) -> tuple[int, int]:
        return sum(self._users.values()), self._tokens


def start_board() -> Any:
    """The handle of a new board's actor."""
    return ray.remote(num_cpus=0)(Board).remote()


class PackPost:
    """A worker's place on the board for one pack."""

    def __init__(self, board: Any, pack_id: str) -> None:
        self._board, self._pack_id, self._users = board, pack_id, 0
        self._tell()

    def add_user(self, _user_key: str) -> None:
        """A user's training ended. Keys stay here."""
        self._users += 1
        self._tell()

    def close(self, users: int) -> None:
        """The pack is done, with all its users: those, too, who failed before they trained."""
        self._users = users
        self._tell()

    def _tell(self) -> None:
        self._board.set_users.remote(self._pack_id, self._users)


class Watch:
    """Feeds the progress bar from the board while the gang runs."""

    def __init__(self, board: Any, progress: Progress, before: int) -> None:
        """`before`: users whose packs were done when the gang started."""
        self._board, self._progress, self._before = board, progress, before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def _follow(self) -> None:
        while not self._stop.wait(TICK_S):
            self._look()

    def _look(self) -> None:
        try:
            users, tokens = ray.get(self._board.read.remote(), timeout=10)
        except ray.exceptions.RayError:
            return  # the bar can wait; the gang's own errors are raised by fit()
        self._progress(self._before + users, tokens)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join(timeout=15)
        self._look()
