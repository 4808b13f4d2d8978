"""Stores in these tests have a known salt."""

from salted import store_salt  # noqa: F401
