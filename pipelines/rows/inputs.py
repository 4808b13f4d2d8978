"""Input files: find them, name those that are not read, cut the others into pieces.

Parquet is cut at row groups and JSONL at line ends, so a large file is read by many tasks;
CSV (a quoted field may hold line ends), JSON arrays and compressed text are streamed whole by
one task. Knows nothing of Ray.
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
from pipelines.rows.streams import EXPECTED, InputFile, kind_of, open_binary, reading, recognise
from ptuning.errors import DataError

_BLOCK = 4 << 20
# `column=value`, as Spark, Hive, pandas and Ray name folders of partitioned data.
_FOLDER = re.compile(r"([A-Za-z_][\w .-]*)=([^?&]*)")
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, slots=True)
class Inspected:
    """A file's content digest (SHA-256, hex) and the pieces it is read in."""

    file: InputFile
    digest: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """What sources name: files to read, and those of folders and globs that are not read."""

    files: tuple[InputFile, ...]
    unread: tuple[str, ...]


def find_files(sources: Sequence[str]) -> Listing:
    """The files behind paths, globs, directories and URIs, sorted, each once.

    A directory is searched to its depths, without entries named `.x` or `_x`. Raises DataError
    where a source yields no file that can be read, or cannot be listed.
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
        if fs.isfile(path):  # before globs: a name may hold brackets
            file = _input_file(_url(fs, path), int(fs.size(path)))
            if file is None:
                raise DataError(
                    "the file's format is not supported", seen=source, expected=EXPECTED
                )
            return Listing((file,), ())
        if fs.isdir(path):
            infos = fs.find(path, detail=True)
            infos = {n: info for n, info in infos.items() if not _hidden(n.removeprefix(path))}
        else:
            infos = fs.glob(path, detail=True)
    except DataError:
        raise
    except Exception as error:
        if local and not isinstance(error, OSError):
            raise
        # Each network file system raises errors of its client's.
        raise DataError("the input cannot be listed", seen=f"{source}: {error}") from error
    urls = {_url(fs, name): info for name, info in infos.items() if info["type"] == "file"}
    files = {url: _input_file(url, int(info["size"])) for url, info in urls.items()}
    known = tuple(file for file in files.values() if file is not None)
    if not known:
        raise DataError(
            "no input file there",
            seen=f"{source} ({len(infos)} entries of other kinds)" if infos else source,
            expected=f"an existing file, or a directory or glob of files with {EXPECTED}",
        )
    return Listing(known, tuple(url for url, file in files.items() if file is None))


def _filesystem(source: str) -> tuple[Any, str]:
    local = source.removeprefix("file://")
    if "://" not in local:
        return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(local))
    try:
        fs, path = fsspec.core.url_to_fs(source)
    except Exception as error:  # no package for s3, no such protocol, no credentials
        raise DataError("this kind of input cannot be read", seen=f"{source}: {error}") from error
    return fs, str(path).rstrip("/")


def _url(fs: Any, path: str) -> str:
    return path if "file" in fs.protocol else str(fs.unstrip_protocol(path))


def _input_file(url: str, size: int) -> InputFile | None:
    known = kind_of(url)
    if known is None:
        return None
    kind, compression = known
    return InputFile(url, kind, size, compression, folders=_folders(url))


def _folders(url: str) -> tuple[tuple[str, str], ...]:
    """Columns that folder names state: the same however the file was named."""
    found = (_FOLDER.fullmatch(part) for part in url.split("/")[:-1])
    pairs = ((match[1], unquote(match[2])) for match in found if match)
    return tuple((name, value) for name, value in pairs if value not in ("", _NO_VALUE))


def _hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/"))


def inspect(file: InputFile, piece_bytes: int) -> Inspected:
    """Read a file once for its digest and its cuts. DataError where it cannot be read."""
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
    """Content digest, size, and (offset, lines before it) of the cuts, if piece_bytes is set."""
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
