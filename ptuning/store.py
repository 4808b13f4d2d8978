"""The store: one directory or object-store prefix with partitions, prefixes and runs.

Writes are atomic: a local file is written in the folder `attempts` and renamed, and an object
store's put is atomic by itself. Races between processes are decided by conditional writes
(conditional.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any, BinaryIO

import fsspec

from ptuning.conditional import ConditionalWrites, conditional_writes
from ptuning.errors import ConfigError, RunError
from ptuning.system.files import sweep_attempts, write_atomic


class Store:
    """Files below one root (a local path or `s3://…`), read and written as a unit."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = str(root).rstrip("/") or "/"
        if "://" not in self.root:
            self.root = os.path.abspath(os.path.expanduser(self.root))
        if "://" not in self.root:  # taken literally: "::" or "#" has no meaning in a local path
            self.fs, self._base = fsspec.filesystem("file"), self.root
            self.is_local = True
            return
        try:
            # No listing cache: other processes write at the same time.
            self.fs, self._base = fsspec.core.url_to_fs(self.root, use_listings_cache=False)
        except ImportError as error:
            raise ConfigError(
                "the store's file system needs a package that is not installed",
                seen=self.root,
                fix=str(error),
            ) from error
        self._base = str(self._base).rstrip("/")
        protocols = (self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol
        self.is_local = "file" in protocols

    def path(self, *parts: str) -> str:
        """The full path or URI of a name below the root."""
        return "/".join([self.root, *parts])

    def _inner(self, name: str) -> str:
        return f"{self._base}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(self._inner(name)))

    def list(self, name: str) -> list[str]:
        """Names of the entries of a folder, sorted; [] if there is no such folder."""
        try:
            found = self.fs.ls(self._inner(name), detail=False)
        except FileNotFoundError:
            return []
        names = (str(entry).rsplit("/", 1)[-1] for entry in found)
        # Other clients put an empty object under a folder's own name into an object store.
        return sorted(name for name in names if name)

    def read(self, name: str) -> bytes:
        with self.fs.open(self._inner(name), "rb") as file:
            return bytes(file.read())

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically: neither a reader nor a crash leaves half of it."""
        if self.is_local:
            write_atomic(self._inner(name), data, self._attempts)
        else:
            self.fs.pipe_file(self._inner(name), data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; returns whether this call wrote it.

        If several processes race, exactly one writes. Example:
        `store.put_if_absent("leases/a.json", b"{}")`.
        """
        return self._conditional.put_if_absent(self._inner(name), data)

    def read_versioned(self, name: str) -> tuple[bytes, str] | None:
        """A file's contents and etag, for `replace_if_unchanged`; None if there is no file."""
        return self._conditional.read(self._inner(name))

    def replace_if_unchanged(self, name: str, data: bytes, etag: str) -> bool:
        """Replace a file if its etag is still `etag`; returns whether this call did.

        If several processes race, one replaces the file; the others get False and must read again.
        """
        return self._conditional.replace_if_unchanged(self._inner(name), data, etag)

    @cached_property
    def _conditional(self) -> ConditionalWrites:
        return conditional_writes(self.fs, self.root, self._attempts)

    @property
    def _attempts(self) -> str:
        """Where files of a local store lie until they are complete."""
        return self._inner("attempts")

    def sweep(self) -> None:
        """Remove the unfinished files that killed processes left in a local store."""
        if self.is_local:
            sweep_attempts(self._attempts)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its contents; does nothing if there is none."""
        if self.exists(name):
            self.fs.rm(self._inner(name), recursive=True)

    @contextlib.contextmanager
    def open_write(self, name: str) -> Iterator[BinaryIO]:
        """A file to write piece by piece; it appears when the block ends without an error."""
        buffer = io.BytesIO()
        yield buffer
        self.write(name, buffer.getvalue())

    def write_once(self, name: str, value: Any) -> bool:
        """Write a JSON file unless it exists; returns whether this call wrote it."""
        return self.put_if_absent(name, _json_bytes(value))

    def read_json(self, name: str) -> Any:
        """The file's JSON value. Raises RunError, with the name, if it is not JSON."""
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            raise RunError(
                "a file of the store is not valid JSON",
                seen=f"{self.path(name)}: {error}",
                fix="remove that file and run again; it will be created again",
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, _json_bytes(value))


def _json_bytes(value: Any) -> bytes:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def prefix_path(user_key: str, digest: str) -> str:
    """The path of a prefix file below a store's root."""
    return f"prefixes/{user_key[:2]}/{user_key}/{digest}.safetensors"


def resume_path(user_key: str, digest: str) -> str:
    """The path of a prefix's resume file below a store's root, if it was kept."""
    return prefix_path(user_key, digest).replace(".safetensors", ".resume.safetensors")
