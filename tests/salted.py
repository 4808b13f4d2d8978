"""A store salt that a module's tests share, so that they know users' keys and compare stores."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ptuning import types

SALT = bytes(range(32))
VARIABLE = "PTUNING_STORE_SALT"


def user_key(user_id: str) -> str:
    """The user's key in a store that was made while `store_salt` held."""
    return types.user_key(user_id, SALT)


@pytest.fixture(scope="module", autouse=True)
def store_salt() -> Iterator[None]:
    """New stores of this module's tests, and of processes that they start, have SALT."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = SALT.hex()
    yield
    if before is None:
        del os.environ[VARIABLE]
    else:
        os.environ[VARIABLE] = before
