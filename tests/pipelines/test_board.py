"""What a gang's workers tell the progress bar."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pipelines.gangs.board import Board, PackPost


class Local:
    """A board in this process, called as Ray's actors are."""

    def __init__(self) -> None:
        self.board = Board()
        self.set_users = SimpleNamespace(remote=self.board.set_users)
        self.add_tokens = SimpleNamespace(remote=self.board.add_tokens)


def users_of(local: Any) -> int:
    users: int = local.board.read()[0]
    return users


def test_users_are_counted_as_they_finish_and_failed_ones_with_their_pack() -> None:
    local = Local()
    first, second = PackPost(local, "first"), PackPost(local, "second")
    first.add_user("ann")
    second.add_user("bob")
    first.add_user("cy")
    assert users_of(local) == 3
    first.close(4)  # two of its users could not be trained
    assert users_of(local) == 5


def test_a_pack_that_is_trained_again_counts_its_users_once() -> None:
    local = Local()
    for _ in range(2):  # the second time after the first worker's death
        post = PackPost(local, "first")
        assert users_of(local) == 0
        post.add_user("ann")
    post.close(2)
    assert users_of(local) == 2
