"""Read an input as a stream of UTF-8, whatever its compression and encoding.

A file's format is determined from its first bytes if they are unambiguous (gzip, Zstandard, bzip2,
Parquet, ZIP, byte-order marks), and otherwise from its name.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any, Literal, cast

import fsspec
import pyarrow as pa

from ptuning.errors import DataError

Kind = Literal["parquet", "jsonl", "json", "csv"]  # json: values may span several lines
Compression = Literal["", "gzip", "zstd", "bz2"]

KINDS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
}
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
EXPECTED = f"a name that ends in {', '.join(KINDS)}; texts also with {', '.join(COMPRESSIONS)}"
UNREADABLE = (OSError, EOFError, UnicodeError, zlib.error, pa.ArrowException)

_HEAD = 1 << 16  # bytes used to recognise a format
_MAGIC: dict[bytes, Compression] = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
}
_MARKS = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_RECORD = b"\x1e"  # begins each value of a JSON text sequence (RFC 7464)


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file: absolute path or URI, format, and size in bytes.

    `folders` are the columns in the names of its folders (`split=test`). `stamp` changes when the
    contents do: the etag in an object store, size and time of change on a disk. It is "" where
    neither is known. `is_fresh`: the file changed so recently when it was inspected that another
    change may have the same stamp.
    """

    url: str
    kind: Kind
    size: int
    compression: Compression = ""
    encoding: str = "utf-8"
    folders: tuple[tuple[str, str], ...] = ()
    stamp: str = ""
    is_fresh: bool = False

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def is_remote(self) -> bool:
        return "://" in self.url

    @property
    def is_plain(self) -> bool:
        """Whether it is uncompressed UTF-8, so that reading can start at any line."""
        return not self.compression and self.encoding == "utf-8"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a file: a range of bytes of JSONL, or of row groups of Parquet; else all of it.

    `first_row` is the number of its first line or row, counted from 1. `size` is in bytes. `digest`
    (SHA-256, hex) identifies the contents.
    """

    start: int
    end: int
    first_row: int
    size: int
    digest: str


def guess_format(name: str) -> tuple[Kind, Compression] | None:
    """A file's format and compression according to its name; None if its ending is unknown."""
    lower = name.lower()
    for ending, compression in COMPRESSIONS.items():
        if lower.endswith(ending):
            inner = guess_format(lower.removesuffix(ending))
            return (inner[0], compression) if inner and inner[0] != "parquet" else None
    kind = next((kind for ending, kind in KINDS.items() if lower.endswith(ending)), None)
    return (kind, "") if kind else None


@contextmanager
def reading(file: InputFile) -> Iterator[None]:
    """Convert errors while reading a file to a DataError that names the file."""
    try:
        yield
    except (*UNREADABLE, DataError) as error:
        raise unreadable(file, error) from error
    except Exception as error:
        if not file.is_remote:
            raise
        # Network file systems raise their client's exceptions.
        raise unreadable(file, error) from error


def unreadable(file: InputFile, error: Exception) -> DataError:
    how = f", {file.compression} compressed" if file.compression else ""
    return DataError(
        "an input file cannot be read",
        seen=f"{file.url}: {' '.join(str(error).split())[:300] or type(error).__name__}",
        expected=f"a complete {file.kind} file{how}",
        fix="repair or omit the file"
        + (", or check why it cannot be reached" if file.is_remote else ""),
    )


def open_filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URI, without its cache of listings: files change between runs of one
    process."""
    fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return fs, str(path)


def open_binary(url: str) -> IO[bytes]:
    """A buffered, seekable reader of a path or URI."""
    if "://" not in url:
        return open(url, "rb", buffering=1 << 20)
    fs, path = open_filesystem(url)
    return io.BufferedReader(fs.open(path, "rb"), 1 << 20)


class _Hashed(io.RawIOBase):
    """The bytes of a chunk, which are hashed as they are read."""

    def __init__(self, stream: IO[bytes], chunk: Chunk) -> None:
        stream.seek(chunk.start)
        self._stream, self._left = stream, chunk.end - chunk.start
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(min(len(buffer), self._left))
        self._digest.update(data)
        self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)

    def hexdigest(self) -> str:
        """Of the whole chunk: what nobody has read yet is read."""
        while data := self._stream.read(min(_HEAD, self._left)):
            self._digest.update(data)
            self._left -= len(data)
        return self._digest.hexdigest()


@contextmanager
def open_chunk(file: InputFile, chunk: Chunk) -> Iterator[IO[bytes]]:
    """The content of a chunk of text, decompressed and as UTF-8. Raises DataError if it is not what
    was inspected: under its digest, a chunk is kept for ever."""
    with ExitStack() as stack:
        hashed = _Hashed(stack.enter_context(open_binary(file.url)), chunk)
        yield _content(stack, io.BufferedReader(hashed, 1 << 20), file)
        if hashed.hexdigest() != chunk.digest:
            raise changed_meanwhile(file)


def changed_meanwhile(file: InputFile) -> DataError:
    return DataError(
        "an input file changed while it was read",
        seen=file.url,
        fix="run again when it is complete",
    )


@contextmanager
def open_content(file: InputFile) -> Iterator[IO[bytes]]:
    """The file's content, decompressed and, for text, as UTF-8."""
    with ExitStack() as stack:
        raw = stack.enter_context(open_binary(file.url))
        yield _content(stack, raw, file)


def _content(stack: ExitStack, raw: Any, file: InputFile) -> IO[bytes]:
    stream: Any = raw
    if file.compression == "gzip":
        stream = stack.enter_context(gzip.GzipFile(fileobj=raw))
    elif file.compression == "bz2":
        stream = stack.enter_context(bz2.BZ2File(raw))
    elif file.compression == "zstd":
        stream = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"))
        stream = stack.enter_context(stream)
    if file.encoding != "utf-8":
        stream = stack.enter_context(io.BufferedReader(_Transcoder(stream, file.encoding)))
    return cast(IO[bytes], stream)


class _Transcoder(io.RawIOBase):
    """Converts a stream in another encoding to UTF-8. Lone surrogates are kept, so they stay
    invalid."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._stream.read(_HEAD)
            text = self._decoder.decode(block, final=not block)
            self._ready = text.encode("utf-8", "surrogatepass")
            if not block:
                break
        taken = self._ready[: len(buffer)]
        self._ready = self._ready[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


def recognise(file: InputFile, raw: IO[bytes]) -> InputFile:
    """The file with the format, compression and encoding that its first bytes show; seeks to 0."""
    head = raw.read(_HEAD)
    if head.startswith(b"PAR1"):
        file = replace(file, kind="parquet", compression="")
    elif head.startswith(b"PK\x03\x04"):
        raise DataError("it is a ZIP archive (an Excel workbook?)")
    elif file.kind != "parquet" and head:
        found = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
        file = replace(file, compression=found or file.compression)
        if file.compression:
            with open_content(file) as content:
                head = content.read(_HEAD)
        file = replace(file, encoding=_encoding(head))
        if file.kind == "jsonl":
            text = head.decode(file.encoding, "replace").encode("utf-8")
            file = replace(file, kind="json" if _spans_lines(text) else "jsonl")
    raw.seek(0)
    return file


def _encoding(head: bytes) -> str:
    """UTF-16 if there is a byte-order mark or a zero byte in the first (ASCII) letter; else
    UTF-8."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    if head[:2].count(0) == 1 and len(head) > 1:
        return "utf-16-le" if head[1] == 0 else "utf-16-be"
    return "utf-8"


def _spans_lines(head: bytes) -> bool:
    """Whether JSON does not have one object per line: it is an array, or objects span lines."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lstrip(_RECORD).lstrip()
    lines = [line for line in text.splitlines() if line.strip(b" \t,")]
    if b"\n" not in text and b"\r" in text.rstrip():
        return True  # old Mac line ends, which line readers do not recognise
    if text.startswith(b"["):
        first = _parse(lines[0])
        if not isinstance(first, list) or (not first and len(lines) == 1):
            return True
        return bool(first) and isinstance(first[0], dict)
    if not text.startswith(b"{") or (len(lines) == 1 and len(head) >= _HEAD):
        return False
    return not any(isinstance(_parse(line), dict) for line in lines) and _starts_with_object(text)


def _parse(line: bytes) -> object:
    try:
        return json.loads(line.lstrip(_RECORD))
    except (ValueError, RecursionError):
        return None


def _starts_with_object(text: bytes) -> bool:
    """Whether the text starts with a complete object, which may span lines."""
    try:
        json.JSONDecoder().raw_decode(text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return False
    return True
