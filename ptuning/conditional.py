"""Conditional writes: the primitive by which racing processes agree.

There are two operations: put a file if it does not exist, and replace a file if nobody has changed
it. On a local disk the first is a hard link; for the second, contents are compared and the file is
renamed under a lock, which the kernel releases if its holder dies. S3 has both as headers of a put
(If-None-Match, If-Match). Other object stores are refused.

A refused put may still have succeeded: a client whose answer was lost retries, and finds its own
object. A caller that must know reads the file and compares it with what it wrote.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ptuning.errors import ConfigError
from ptuning.system.files import write_atomic, write_new

_LOST = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_ABSENT = ("NoSuchKey", "404")


class ConditionalWrites(Protocol):
    """`path` is a file's path in the file system; an etag identifies a file's contents."""

    def put_if_absent(self, path: str, data: bytes) -> bool: ...

    def read(self, path: str) -> tuple[bytes, str] | None: ...

    def replace_if_unchanged(self, path: str, data: bytes, etag: str) -> bool: ...


def conditional_writes(fs: Any, root: str, attempts: str) -> ConditionalWrites:
    """The conditional writes of an fsspec file system; on a local disk, unfinished files lie in the
    folder `attempts`. Raises ConfigError if it has none that are safe."""
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if "file" in protocols:
        return LocalWrites(attempts)
    if "s3" in protocols:
        return S3Writes(fs)
    raise ConfigError(
        "a store of this kind cannot decide races between processes",
        seen=root,
        expected="a local directory, or s3://bucket/prefix",
        fix="use one of these for --store",
    )


class LocalWrites:
    """Conditional writes on a local disk."""

    def __init__(self, attempts: str) -> None:
        self._attempts = attempts

    def put_if_absent(self, path: str, data: bytes) -> bool:
        return write_new(path, data, self._attempts)

    def read(self, path: str) -> tuple[bytes, str] | None:
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        return data, hashlib.sha256(data).hexdigest()

    def replace_if_unchanged(self, path: str, data: bytes, etag: str) -> bool:
        with _lock_file(path):
            current = self.read(path)
            if current is None or current[1] != etag:
                return False
            write_atomic(path, data, self._attempts)
            return True


@contextmanager
def _lock_file(path: str) -> Iterator[None]:
    """Hold a file's lock. The lock file is never removed: otherwise two processes could hold locks
    on two different files of the same name."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f".{name}.lock"), "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class S3Writes:
    """Conditional writes on S3, and on servers that honour its conditional headers."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def put_if_absent(self, path: str, data: bytes) -> bool:
        return self._put(path, data, IfNoneMatch="*")

    def read(self, path: str) -> tuple[bytes, str] | None:
        bucket, key = self._place(path)
        try:
            answer = self._fs.call_s3("get_object", Bucket=bucket, Key=key)
            return _body(self._fs, answer), str(answer["ETag"])
        except FileNotFoundError:
            return None
        except Exception as error:
            if _has_code(error, _ABSENT):
                return None
            raise

    def replace_if_unchanged(self, path: str, data: bytes, etag: str) -> bool:
        try:
            return self._put(path, data, IfMatch=etag)
        except FileNotFoundError:
            return False  # the file was removed

    def _put(self, path: str, data: bytes, **condition: str) -> bool:
        bucket, key = self._place(path)
        try:
            self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except Exception as error:
            if _has_code(error, _LOST):
                return False
            if "IfMatch" in condition and _has_code(error, _ABSENT):
                return False
            raise
        return True

    def _place(self, path: str) -> tuple[str, str]:
        bucket, key, _ = self._fs.split_path(path)
        return bucket, key


def _body(fs: Any, answer: Any) -> bytes:
    from fsspec.asyn import sync

    async def read() -> bytes:
        return bytes(await answer["Body"].read())

    return bytes(sync(fs.loop, read))


def _has_code(error: BaseException | None, codes: tuple[str, ...]) -> bool:
    """Whether an error, or one of its causes, is an S3 response with one of these codes."""
    while error is not None:
        code = getattr(error, "response", {}).get("Error", {}).get("Code")
        if code in codes:
            return True
        error = error.__cause__
    return False
