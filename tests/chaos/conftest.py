"""Stores in these tests have a known salt."""

from salted import store_salt  # noqa: F401
from store_backends import s3_server  # noqa: F401
