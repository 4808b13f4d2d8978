"""Find input files, list those that are not read, and cut the others into chunks.

Parquet is cut at row groups and JSONL at line ends, so many tasks can read a large file. CSV (a
quoted field may contain line ends), JSON arrays and compressed text are one chunk, streamed by one
task. Cuts depend on what is before them only: a file that has grown has the same chunks, but for
the last. Does not use Ray.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any
from urllib.parse import unquote

import fsspec
import pyarrow.parquet as pq

from pipelines.rows.streams import (
    EXPECTED,
    Chunk,
    InputFile,
    changed_meanwhile,
    guess_format,
    open_binary,
    open_filesystem,
    reading,
    recognise,
)
from ptuning.errors import DataError

CHUNK_BYTES = 64 << 20
_BLOCK = 4 << 20
_FRESH_SECONDS = 2.0  # file systems keep times in steps of up to 2 s
# `column=value`: the folder names of partitioned data in Spark, Hive, pandas and Ray.
_FOLDER = re.compile(r"([A-Za-z_][\w .-]*)=([^?&]*)")
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, slots=True)
class Inspected:
    """A file's chunks."""

    file: InputFile
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """The files found: those to read, and those in folders and globs that are not read."""

    files: tuple[InputFile, ...]
    unread: tuple[str, ...]


def find_files(sources: Sequence[str]) -> Listing:
    """The files named by paths, globs, directories and URIs, sorted and without duplicates.

    Directories are searched recursively, except entries named `.x` or `_x`. Raises DataError if a
    source has no readable file or cannot be listed.
    """
    if isinstance(sources, str):
        raise TypeError("sources is one string; pass a list of paths")
    found: dict[str, InputFile] = {}
    unread: set[str] = set()
    for source in sources:
        listing = _expand(source)
        found |= {file.url: file for file in listing.files}
        unread |= set(listing.unread)
    if not found:
        raise DataError("no input was named", fix="name at least one file, directory or glob")
    return Listing(tuple(found[url] for url in sorted(found)), tuple(sorted(unread)))


def _expand(source: str) -> Listing:
    fs, path = _filesystem(source)
    local = "file" in fs.protocol
    try:
        if fs.isfile(path):  # checked before globs, since a name may contain brackets
            file = _input_file(_url(fs, path), fs.info(path))
            if file is None:
                raise DataError(
                    "the file's format is not supported", seen=source, expected=EXPECTED
                )
            return Listing((file,), ())
        if fs.isdir(path):
            infos = _walk(path) if local else fs.find(path, detail=True)
            infos = {n: info for n, info in infos.items() if not _is_hidden(n.removeprefix(path))}
        else:
            infos = fs.glob(path, detail=True)
    except DataError:
        raise
    except Exception as error:
        if local and not isinstance(error, OSError):
            raise
        # Network file systems raise their client's exceptions.
        raise DataError("the input cannot be listed", seen=f"{source}: {error}") from error
    urls = {
        _url(fs, name): info
        for name, info in infos.items()
        if info["type"] == "file" or (local and os.path.isfile(name))
    }
    files = {url: _input_file(url, info) for url, info in urls.items()}
    known = tuple(file for file in files.values() if file is not None)
    if not known:
        raise DataError(
            "no input file there",
            seen=f"{source} ({len(infos)} other entries)" if infos else source,
            expected=f"an existing file, or a directory or glob of files with {EXPECTED}",
        )
    return Listing(known, tuple(url for url, file in files.items() if file is None))


def _walk(folder: str) -> dict[str, dict[str, Any]]:
    """The files below a local folder, through links too; no folder twice."""
    found: dict[str, dict[str, Any]] = {}
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in seen]
        seen |= set(real.values())
        for name in files:
            path = os.path.join(parent, name)
            if os.path.isfile(path):
                found[path] = {"type": "file", "size": os.path.getsize(path)}
    return found


def _filesystem(source: str) -> tuple[Any, str]:
    local = source.removeprefix("file://")
    if "://" not in local:
        return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(local))
    try:
        fs, path = open_filesystem(source)
    except Exception as error:  # no package for the protocol, unknown protocol, no credentials
        raise DataError("this kind of input cannot be read", seen=f"{source}: {error}") from error
    return fs, str(path).rstrip("/")


def _url(fs: Any, path: str) -> str:
    return path if "file" in fs.protocol else str(fs.unstrip_protocol(path))


def _input_file(url: str, info: Mapping[str, Any]) -> InputFile | None:
    known = guess_format(url)
    if known is None:
        return None
    kind, compression = known
    stamp = _remote_stamp(info) if "://" in url else _stamp_of(url)
    size = int(info["size"]) if "://" in url else os.path.getsize(url)
    return InputFile(url, kind, size, compression, folders=_folders(url), stamp=stamp)


def _folders(url: str) -> tuple[tuple[str, str], ...]:
    """Columns in the names of a file's folders, however the file was specified."""
    found = (_FOLDER.fullmatch(part) for part in url.split("/")[:-1])
    pairs = ((match[1], unquote(match[2])) for match in found if match)
    return tuple((name, value) for name, value in pairs if value not in ("", _NO_VALUE))


def _is_hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/"))


def inspect(file: InputFile, chunk_bytes: int = CHUNK_BYTES) -> Inspected:
    """Read a file once, for its chunks. Raises DataError if it cannot be read."""
    with reading(file), open_binary(file.url) as stream:
        file = recognise(file, stream)
        file = replace(file, is_fresh=_is_fresh(file))
        if file.kind == "jsonl" and file.is_plain:
            chunks = tuple(_cut_lines(stream, chunk_bytes))
            size = sum(chunk.size for chunk in chunks)
            return Inspected(replace(file, size=size), chunks)
        digest, size = _scan(stream)
        file = replace(file, size=size)
        if file.kind == "parquet":
            stream.seek(0)
            return Inspected(file, _cut_row_groups(stream, digest, chunk_bytes))
    whole = (Chunk(0, size, 1, size, digest),) if size else ()
    return Inspected(file, whole)


def check_unchanged(file: InputFile) -> None:
    """Raise DataError if a file's stamp is not that of its inspection."""
    if file.stamp and _stamp_of(file.url) not in ("", file.stamp):
        raise changed_meanwhile(file)


def _stamp_of(url: str) -> str:
    """See `InputFile.stamp`."""
    if "://" not in url:
        try:
            found = os.stat(url)
        except OSError:
            return ""  # reading it will say why
        return f"{found.st_size}-{found.st_mtime_ns}"
    fs, path = open_filesystem(url)
    return _remote_stamp(fs.info(path))


def _remote_stamp(info: Mapping[str, Any]) -> str:
    """The etag, if the file system gives one."""
    return str(info.get("ETag") or info.get("etag") or "").strip('"')


def _is_fresh(file: InputFile) -> bool:
    """Whether a local file changed so recently that another change may have the same time."""
    return not file.is_remote and time.time() - os.stat(file.url).st_mtime < _FRESH_SECONDS


def _scan(stream: IO[bytes]) -> tuple[str, int]:
    """Digest and size of the contents."""
    digest, size = hashlib.sha256(), 0
    while block := stream.read(_BLOCK):
        digest.update(block)
        size += len(block)
    return digest.hexdigest(), size


def _cut_lines(stream: IO[bytes], chunk_bytes: int) -> Iterator[Chunk]:
    """Chunks of whole lines: each ends with the first line that makes it `chunk_bytes` long."""
    digest, start, first, position, lines = hashlib.sha256(), 0, 1, 0, 0
    while block := stream.read(_BLOCK):
        at = 0
        while (end := block.find(b"\n", max(start + chunk_bytes - 1 - position, at))) >= 0:
            digest.update(memoryview(block)[at : end + 1])
            lines += block.count(b"\n", at, end + 1)
            at = end + 1
            size = position + at - start
            yield Chunk(start, start + size, first, size, digest.hexdigest())
            digest, start, first = hashlib.sha256(), position + at, lines + 1
        digest.update(memoryview(block)[at:])
        lines += block.count(b"\n", at)
        position += len(block)
    if position > start:
        yield Chunk(start, position, first, position - start, digest.hexdigest())


def _cut_row_groups(stream: IO[bytes], digest: str, chunk_bytes: int) -> tuple[Chunk, ...]:
    metadata = pq.read_metadata(stream)
    chunks: list[Chunk] = []
    start, size, first, rows = 0, 0, 1, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        rows += metadata.row_group(group).num_rows
        if size >= chunk_bytes or group == metadata.num_row_groups - 1:
            of_groups = _sha256(f"{digest} {start} {group + 1}")
            chunks.append(Chunk(start, group + 1, first, size, of_groups))
            start, size, first = group + 1, 0, rows + 1
    return tuple(chunks)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()
