"""Conditional writes: the one primitive by which processes that race agree.

Put a file if its name is free; replace a file if nobody has changed it. Local disks offer the
first as a hard link, and no library offers the second: contents are compared and the file is
renamed under a lock, which the kernel drops when its holder dies. S3 has both as headers of a put
(If-None-Match, If-Match). Other object stores are refused rather than trusted.

A put that was refused may have been done all the same: a client whose answer was lost puts again,
and meets its own object. Whoever must know reads what is there and looks for something of its own.
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
    """`path` is what the file system calls a file; an etag stands for a file's contents."""

    def put_if_absent(self, path: str, data: bytes) -> bool: ...

    def read(self, path: str) -> tuple[bytes, str] | None: ...

    def replace_if_unchanged(self, path: str, data: bytes, etag: str) -> bool: ...


def conditional_writes(fs: Any, root: str) -> ConditionalWrites:
    """Those of an fsspec file system. Raises ConfigError where it has none that can be trusted."""
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if "file" in protocols:
        return LocalWrites()
    if "s3" in protocols:
        return S3Writes(fs)
    raise ConfigError(
        "a store of this kind cannot decide races between processes",
        seen=root,
        expected="a local directory, or s3://bucket/prefix",
        fix="give --store one of these",
    )


class LocalWrites:
    """On a local disk."""

    def put_if_absent(self, path: str, data: bytes) -> bool:
        return write_new(path, data)

    def read(self, path: str) -> tuple[bytes, str] | None:
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        return data, hashlib.sha256(data).hexdigest()

    def replace_if_unchanged(self, path: str, data: bytes, etag: str) -> bool:
        with _locked(path):
            present = self.read(path)
            if present is None or present[1] != etag:
                return False
            write_atomic(path, data)
            return True


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Alone with a file, among those who ask. The lock's file stays: removing it would let two
    processes hold locks on two files of its name."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f".{name}.lock"), "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class S3Writes:
    """On S3, and on servers that honour its conditional headers."""

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
            if _says(error, _ABSENT):
                return None
            raise

    def replace_if_unchanged(self, path: str, data: bytes, etag: str) -> bool:
        try:
            return self._put(path, data, IfMatch=etag)
        except FileNotFoundError:
            return False  # somebody removed it

    def _put(self, path: str, data: bytes, **condition: str) -> bool:
        bucket, key = self._place(path)
        try:
            self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except Exception as error:
            if _says(error, _LOST):
                return False
            if "IfMatch" in condition and _says(error, _ABSENT):
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


def _says(error: BaseException | None, codes: tuple[str, ...]) -> bool:
    """Whether an error, or one that it was raised from, is S3's answer of one of these codes."""
    while error is not None:
        code = getattr(error, "response", {}).get("Error", {}).get("Code")
        if code in codes:
            return True
        error = error.__cause__
    return False
