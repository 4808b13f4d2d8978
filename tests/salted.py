"""A fixed store salt, so that tests know users' keys and can compare stores."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ptuning import types

SALT = bytes(range(32))
VARIABLE = "PTUNING_STORE_SALT"


def user_key(user_id: str) -> str:
    """The user's key in a store created under `store_salt`."""
    return types.user_key(user_id, SALT)


@pytest.fixture(scope="module", autouse=True)
def store_salt() -> Iterator[None]:
    """Stores created by this module's tests, and by processes they start, have SALT."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = SALT.hex()
    yield
    if before is None:
        del os.environ[VARIABLE]
    else:
        os.environ[VARIABLE] = before
