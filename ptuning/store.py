"""The store: one directory or object-store prefix that holds partitions, prefixes and runs.

Every write goes to a name of its attempt and is moved into place once, so that a reader
sees a whole file or none. On object stores a put is already atomic, and the move is a copy.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

import fsspec

from ptuning.errors import ConfigError, RunError


class Store:
    """Paths below one root (local path, `s3://…`, `gs://…`), read and written whole."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = str(root).rstrip("/") or "/"
        if "://" not in self.root:
            self.root = os.path.abspath(os.path.expanduser(self.root))
        try:
            # Listings must be fresh: other processes write while this one looks.
            fresh = {} if "://" not in self.root else {"use_listings_cache": False}
            self.fs, self._base = fsspec.core.url_to_fs(self.root, **fresh)
        except ImportError as error:
            raise ConfigError(
                "the store's file system needs a package that is not installed",
                seen=self.root,
                fix=str(error),
            ) from error
        self.is_local = "file" in self.fs.protocol

    def path(self, *parts: str) -> str:
        """The full path or URI of a name below the root."""
        return "/".join([self.root, *parts])

    def _inner(self, name: str) -> str:
        return f"{self._base}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(self._inner(name)))

    def list(self, name: str) -> list[str]:
        """Names of the entries of a folder, sorted; [] where there is none."""
        try:
            found = self.fs.ls(self._inner(name), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(entry).rsplit("/", 1)[-1] for entry in found)

    def read(self, name: str) -> bytes:
        with self.fs.open(self._inner(name), "rb") as file:
            return bytes(file.read())

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file; a reader or a crash never meets half of it."""
        target = self._inner(name)
        attempt = f"{target}.{uuid.uuid4().hex}.tmp"
        self.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        if not self.is_local:
            self.fs.pipe_file(target, data)
            return
        try:
            _write_synced(attempt, data)
            os.replace(attempt, target)
        except BaseException:
            _discard(attempt)
            raise

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all it holds; nothing happens where there is none."""
        if self.exists(name):
            self.fs.rm(self._inner(name), recursive=True)

    @contextlib.contextmanager
    def open_write(self, name: str) -> Iterator[BinaryIO]:
        """A file to write piece by piece; it appears whole when the block ends without error."""
        buffer = io.BytesIO()
        yield buffer
        self.write(name, buffer.getvalue())

    def write_once(self, name: str, value: Any) -> bool:
        """Write a JSON file unless the name is taken; says whether this call wrote it.

        The first writer wins even where two race (on local file systems; object stores have
        no such operation here, so there the check and the put are two steps).
        """
        target, data = self._inner(name), _json_bytes(value)
        if not self.is_local:
            if self.fs.exists(target):
                return False
            self.fs.pipe_file(target, data)
            return True
        self.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        attempt = f"{target}.{uuid.uuid4().hex}.tmp"
        try:
            _write_synced(attempt, data)
            os.link(attempt, target)
        except FileExistsError:
            return False
        finally:
            _discard(attempt)
        return True

    def read_json(self, name: str) -> Any:
        """The file's JSON value; RunError (with the name) where it is not JSON."""
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            raise RunError(
                "a file of the store is not valid JSON",
                seen=f"{self.path(name)}: {error}",
                fix="remove that file and run again; it will be made anew",
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, _json_bytes(value))


def _json_bytes(value: Any) -> bytes:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def _write_synced(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _discard(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def prefix_path(user_key: str, digest: str) -> str:
    """Where a prefix file lies below a store's root."""
    return f"prefixes/{user_key[:2]}/{user_key}/{digest}.safetensors"


def resume_path(user_key: str, digest: str) -> str:
    """Where the state that continues a prefix's training lies, if it was kept."""
    return prefix_path(user_key, digest).replace(".safetensors", ".resume.safetensors")


def read_uri(uri: str) -> bytes:
    """The bytes behind a path or URI, as a registry version names it."""
    with fsspec.open(uri, "rb") as file:
        return bytes(file.read())
