"""Input files to raw rows: find them, cut them into pieces, read a piece row by row.

Reading yields what stands in the file and never fails on a bad row: a reason takes its
place. Parquet is cut at row groups and JSONL at line ends, so a large file is read by many
tasks; CSV (a quoted field may hold line ends) and gzip are streamed whole by one task.
Knows nothing of Ray.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import IO, Any, Literal, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from ptuning.data.examples import COLUMNS
from ptuning.errors import DataError

Kind = Literal["parquet", "jsonl", "csv"]
SUFFIXES: dict[str, Kind] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".csv": "csv",
    ".csv.gz": "csv",
}
MAX_LINE = 32 << 20  # bytes of one JSONL line
_MAX_FIELD = 1 << 20  # characters of one CSV field; bounds what an unclosed quote swallows
_BLOCK = 4 << 20
_BAD_TEXT = "\udcff"  # stands for text that is not UTF-8; the row's check refuses it
UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowException)

RawRow = tuple[int, dict[str, object] | str]  # row number from 1; values, or why there are none


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file: absolute path or URI, its format, and its size in bytes."""

    url: str
    kind: Kind
    size: int

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def gzipped(self) -> bool:
        return self.url.lower().endswith(".gz")


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a file: bytes of JSONL, row groups of Parquet (`start` to before `end`).

    `first_row` is the number of its first line or row, from 1. `size` is in bytes.
    """

    file: InputFile
    start: int
    end: int
    first_row: int
    size: int


@dataclass(frozen=True, slots=True)
class Inspected:
    """A file's content digest (SHA-256, hex) and the pieces it is read in."""

    file: InputFile
    digest: str
    pieces: tuple[Piece, ...]


def find_files(sources: Sequence[str]) -> list[InputFile]:
    """The files behind paths, globs, directories and URIs, sorted, each once.

    In directories and globs only supported formats are taken; a directory is searched to
    its depths, without entries named `.x` or `_x`. Raises DataError where a source yields none.
    """
    if isinstance(sources, str):
        raise TypeError("sources is one string; pass a list of paths")
    found: dict[str, InputFile] = {}
    for source in sources:
        for file in _expand(source):
            found[file.url] = file
    if not found:
        raise DataError("no input was named", fix="name at least one file, directory or glob")
    return [found[url] for url in sorted(found)]


def _expand(source: str) -> list[InputFile]:
    fs, path = _filesystem(source)
    try:
        if fs.isfile(path):  # before globs: a name may hold brackets
            kind = _kind_of(path)
            if kind is None:
                raise DataError(
                    "the file's format is not supported",
                    seen=source,
                    expected=f"a name that ends in {', '.join(SUFFIXES)}",
                )
            return [InputFile(_url(fs, path), kind, int(fs.size(path)))]
        if fs.isdir(path):
            infos = fs.find(path, detail=True)
            infos = {n: info for n, info in infos.items() if not _hidden(n.removeprefix(path))}
        else:
            infos = fs.glob(path, detail=True)
    except OSError as error:
        raise DataError("the input cannot be listed", seen=f"{source}: {error}") from error
    files = [
        InputFile(_url(fs, name), kind, int(info["size"]))
        for name, info in infos.items()
        if info["type"] == "file" and (kind := _kind_of(name))
    ]
    if not files:
        raise DataError(
            "no input file there",
            seen=f"{source} ({len(infos)} entries of other kinds)" if infos else source,
            expected=f"an existing file, directory or glob of {', '.join(SUFFIXES)}",
        )
    return files


def _filesystem(source: str) -> tuple[Any, str]:
    local = source.removeprefix("file://")
    if "://" not in local:
        return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(local))
    try:
        fs, path = fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:  # no package for s3, or no such protocol
        raise DataError("this kind of input cannot be read", seen=f"{source}: {error}") from error
    return fs, str(path).rstrip("/")


def _url(fs: Any, path: str) -> str:
    return path if "file" in fs.protocol else str(fs.unstrip_protocol(path))


def _kind_of(name: str) -> Kind | None:
    lower = name.lower()
    return next((kind for suffix, kind in SUFFIXES.items() if lower.endswith(suffix)), None)


def _hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/"))


def open_binary(url: str) -> IO[bytes]:
    """A buffered, seekable reader of a path or URI."""
    if "://" not in url:
        return open(url, "rb", buffering=1 << 20)
    fs, path = fsspec.core.url_to_fs(url)
    return io.BufferedReader(fs.open(path, "rb"), 1 << 20)


def inspect(file: InputFile, piece_bytes: int) -> Inspected:
    """Read a file once for its digest and its cuts. DataError where it cannot be read."""
    try:
        with open_binary(file.url) as stream:
            lines = file.kind == "jsonl" and not file.gzipped
            digest, size, cuts = _scan(stream, piece_bytes if lines else None)
            file = replace(file, size=size)
            if file.kind == "parquet":
                stream.seek(0)
                return Inspected(file, digest, _row_groups(file, stream, piece_bytes))
    except UNREADABLE as error:
        raise unreadable(file, error) from error
    ends = [start for start, _ in cuts[1:]] + [file.size]
    pieces = [
        Piece(file, start, end, first + 1, end - start)
        for (start, first), end in zip(cuts, ends, strict=True)
        if end > start
    ]
    return Inspected(file, digest, tuple(pieces))


def unreadable(file: InputFile, error: Exception) -> DataError:
    return DataError(
        "an input file cannot be read",
        seen=f"{file.url}: {' '.join(str(error).split())[:300] or type(error).__name__}",
        expected=f"a whole {file.kind} file{', gzipped' if file.gzipped else ''}",
        fix="repair the file or leave it out",
    )


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
    names = metadata.schema.to_arrow_schema().names
    twice = sorted({name for name in COLUMNS if names.count(name) > 1})
    if twice:
        raise DataError("a column stands twice in an input file", seen=f"{twice} in {file.url}")
    pieces: list[Piece] = []
    start, size, first, rows = 0, 0, 1, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        rows += metadata.row_group(group).num_rows
        if size >= piece_bytes or group == metadata.num_row_groups - 1:
            pieces.append(Piece(file, start, group + 1, first, size))
            start, size, first = group + 1, 0, rows + 1
    return tuple(pieces)


def read_piece(piece: Piece) -> Iterator[RawRow]:
    """A piece's raw rows and their numbers. Raises DataError or one of UNREADABLE."""
    with ExitStack() as stack:
        stream = stack.enter_context(open_binary(piece.file.url))
        if piece.file.gzipped:
            stream = stack.enter_context(cast(IO[bytes], gzip.GzipFile(fileobj=stream)))
        if piece.file.kind == "parquet":
            yield from _read_parquet(stream, piece)
        elif piece.file.kind == "csv":
            yield from _read_csv(stream)
        else:
            stream.seek(piece.start)
            length = None if piece.file.gzipped else piece.end - piece.start
            yield from _read_jsonl(stream, piece.first_row, length)


def _read_jsonl(stream: IO[bytes], first_row: int, length: int | None) -> Iterator[RawRow]:
    """Numbered by line. Blank lines are counted and skipped. `length` is in bytes."""
    number, done = first_row - 1, 0
    while length is None or done < length:
        line = stream.readline(MAX_LINE)
        if not line:
            return
        number, done = number + 1, done + len(line)
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            while (rest := stream.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                done += len(rest)
            done += len(rest)
            yield number, f"the line is longer than {MAX_LINE >> 20} MiB"
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, _parse_json(line)


def _parse_json(line: bytes) -> dict[str, object] | str:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "the line is not valid UTF-8"
    except (ValueError, RecursionError):
        return "the line is not valid JSON"
    return value if isinstance(value, dict) else "the line is not a JSON object"


def _read_parquet(stream: IO[bytes], piece: Piece) -> Iterator[RawRow]:
    table = pq.ParquetFile(stream)
    names = [name for name in COLUMNS if name in table.schema_arrow.names]
    number = piece.first_row
    groups = list(range(piece.start, piece.end))
    if not names:
        rows = sum(table.metadata.row_group(group).num_rows for group in groups)
        yield from ((number + offset, {}) for offset in range(rows))
        return
    for batch in table.iter_batches(batch_size=2048, row_groups=groups, columns=names):
        columns = [_values(batch.column(name)) for name in names]
        for offset, values in enumerate(zip(*columns, strict=True)):
            yield number + offset, dict(zip(names, values, strict=True))
        number += batch.num_rows


def _values(array: pa.Array) -> list[object]:
    """Python values; times as epoch milliseconds, because nanoseconds have no datetime."""
    kind = array.type
    if pa.types.is_date(kind):
        array = array.cast(pa.timestamp("ms"))
        kind = array.type
    if pa.types.is_timestamp(kind):
        per_ms = {"s": None, "ms": 1, "us": 1_000, "ns": 1_000_000}[kind.unit]
        ticks = array.cast(pa.int64()).to_pylist()
        return [
            None if tick is None else tick * 1_000 if per_ms is None else tick // per_ms
            for tick in ticks
        ]
    try:
        return list(array.to_pylist())
    except ValueError:  # UnicodeDecodeError among them: find the values that are at fault
        return [_value(scalar) for scalar in array]


def _value(scalar: pa.Scalar) -> object:
    try:
        return scalar.as_py()
    except ValueError:
        return _BAD_TEXT


class _Lines:
    """Lines that can be handed back, so that a bad CSV record costs its first line alone."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self._again, self.used = lines, deque[str](), list[str]()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.used.append(line)
        return line

    def hand_back(self) -> None:
        """Give all but the first line used since the last record to the next one."""
        self._again.extendleft(reversed(self.used[1:]))


def _read_csv(stream: IO[bytes]) -> Iterator[RawRow]:
    """Numbered by record after the header. An empty cell is an absent value."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(_MAX_FIELD)
    lines = _Lines(iter(text))
    records = csv.reader(lines, strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        lines.used.clear()
        try:
            record = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise DataError("the header is not a CSV record") from error
            lines.hand_back()
            number += 1
            yield number, f"not a CSV record: {str(error).split('(')[0].strip()}"
            continue
        if not record:
            continue
        if header is None:
            header = record
            if len(set(header)) < len(header):
                raise DataError("the header names a column twice")
            continue
        number += 1
        if len(record) != len(header):
            yield number, f"the record has {len(record)} fields, the header {len(header)}"
        else:
            yield number, _csv_row(dict(zip(header, record, strict=True)))


def _csv_row(cells: dict[str, str]) -> dict[str, object] | str:
    row: dict[str, object] = {name: cell for name, cell in cells.items() if cell}
    if "completion" in row and "prompt" in cells:
        row.setdefault("prompt", "")  # an empty prompt is a prompt
    if "messages" in row:
        try:
            row["messages"] = json.loads(cells["messages"])
        except (ValueError, RecursionError):
            return "messages is not valid JSON"
    return row
