"""Find input files, list those that are not read, and split the others into pieces.

Parquet is split at row groups and JSONL at line ends, so many tasks can read a large file. CSV (a
quoted field may contain line ends), JSON arrays and compressed text are streamed by one task. Does
not use Ray.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import IO, Any
from urllib.parse import unquote

import fsspec
import pyarrow.parquet as pq

from pipelines.rows.readers import Piece
from pipelines.rows.streams import (
    EXPECTED,
    InputFile,
    guess_format,
    open_binary,
    reading,
    recognise,
)
from ptuning.errors import DataError

_BLOCK = 4 << 20
# `column=value`: the folder names of partitioned data in Spark, Hive, pandas and Ray.
_FOLDER = re.compile(r"([A-Za-z_][\w .-]*)=([^?&]*)")
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, slots=True)
class Inspected:
    """A file's content digest (SHA-256, hex) and its pieces."""

    file: InputFile
    digest: str
    pieces: tuple[Piece, ...]


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
            file = _input_file(_url(fs, path), int(fs.size(path)))
            if file is None:
                raise DataError(
                    "the file's format is not supported", seen=source, expected=EXPECTED
                )
            return Listing((file,), ())
        if fs.isdir(path):
            infos = fs.find(path, detail=True)
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
    urls = {_url(fs, name): info for name, info in infos.items() if info["type"] == "file"}
    files = {url: _input_file(url, int(info["size"])) for url, info in urls.items()}
    known = tuple(file for file in files.values() if file is not None)
    if not known:
        raise DataError(
            "no input file there",
            seen=f"{source} ({len(infos)} other entries)" if infos else source,
            expected=f"an existing file, or a directory or glob of files with {EXPECTED}",
        )
    return Listing(known, tuple(url for url, file in files.items() if file is None))


def _filesystem(source: str) -> tuple[Any, str]:
    local = source.removeprefix("file://")
    if "://" not in local:
        return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(local))
    try:
        fs, path = fsspec.core.url_to_fs(source)
    except Exception as error:  # no package for the protocol, unknown protocol, no credentials
        raise DataError("this kind of input cannot be read", seen=f"{source}: {error}") from error
    return fs, str(path).rstrip("/")


def _url(fs: Any, path: str) -> str:
    return path if "file" in fs.protocol else str(fs.unstrip_protocol(path))


def _input_file(url: str, size: int) -> InputFile | None:
    known = guess_format(url)
    if known is None:
        return None
    kind, compression = known
    return InputFile(url, kind, size, compression, folders=_folders(url))


def _folders(url: str) -> tuple[tuple[str, str], ...]:
    """Columns in the names of a file's folders, however the file was specified."""
    found = (_FOLDER.fullmatch(part) for part in url.split("/")[:-1])
    pairs = ((match[1], unquote(match[2])) for match in found if match)
    return tuple((name, value) for name, value in pairs if value not in ("", _NO_VALUE))


def _is_hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/"))


def inspect(file: InputFile, piece_bytes: int) -> Inspected:
    """Read a file once, for its digest and pieces. Raises DataError if it cannot be read."""
    with reading(file), open_binary(file.url) as stream:
        file = recognise(file, stream)
        lines = file.kind == "jsonl" and file.is_plain
        digest, size, cuts = _scan(stream, piece_bytes if lines else None)
        file = replace(file, size=size)
        if file.kind == "parquet":
            stream.seek(0)
            return Inspected(file, digest, _row_groups(file, stream, piece_bytes))
    ends = [start for start, _ in cuts[1:]] + [file.size]
    pieces = [
        Piece(file, start, end, first + 1, end - start)
        for (start, first), end in zip(cuts, ends, strict=True)
        if end > start
    ]
    return Inspected(file, digest, tuple(pieces))


def _scan(stream: IO[bytes], piece_bytes: int | None) -> tuple[str, int, list[tuple[int, int]]]:
    """Content digest, size and, if `piece_bytes` is set, the start of each piece as (offset, number
    of lines before it)."""
    digest, position, lines = hashlib.sha256(), 0, 0
    cuts = [(0, 0)]
    while block := stream.read(_BLOCK):
        digest.update(block)
        at = 0
        while piece_bytes is not None:
            end = block.find(b"\n", max(cuts[-1][0] + piece_bytes - position, at))
            if end < 0:
                break
            lines += block.count(b"\n", at, end + 1)
            at = end + 1
            cuts.append((position + at, lines))
        if piece_bytes is not None:
            lines += block.count(b"\n", at)
        position += len(block)
    return digest.hexdigest(), position, cuts


def _row_groups(file: InputFile, stream: IO[bytes], piece_bytes: int) -> tuple[Piece, ...]:
    metadata = pq.read_metadata(stream)
    pieces: list[Piece] = []
    start, size, first, rows = 0, 0, 1, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        rows += metadata.row_group(group).num_rows
        if size >= piece_bytes or group == metadata.num_row_groups - 1:
            pieces.append(Piece(file, start, group + 1, first, size))
            start, size, first = group + 1, 0, rows + 1
    return tuple(pieces)
