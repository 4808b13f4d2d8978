"""Packs of users without rows, for tests that only hand packs out."""

from __future__ import annotations

from pipelines.plan import Pack, PlannedUser, make_pack


def user_of(key: str, tokens: int = 1) -> PlannedUser:
    return PlannedUser(user_key=key, tokens=tokens, data_digest="d", training_digest=f"t{key}")


def pack_of(*keys: str, tokens: int = 1) -> Pack:
    return make_pack([user_of(key, tokens) for key in keys])
