"""Read a chunk of a file as raw rows, whatever its format.

Reading yields the contents of the file and never fails on a bad row: the row is replaced by a
reason. Every format gives rows as objects by column name; `ptuning.data.columns` decides what the
columns mean.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import IO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.rows.streams import (
    UNREADABLE,
    Chunk,
    InputFile,
    open_binary,
    open_chunk,
    open_content,
)
from ptuning.data.columns import Columns
from ptuning.data.times import EpochMs
from ptuning.data.values import Notes
from ptuning.errors import DataError

MAX_LINE = 32 << 20  # bytes of one JSON value
_MAX_FIELD = 1 << 20  # characters of one CSV field; limits the damage of an unclosed quote
_BLOCK = 1 << 20
_BAD_TEXT = "\udcff"  # stands for text that is not UTF-8; the row's check refuses it
_MARK = "\ufeff"
_RECORD = b"\x1e"  # begins each value of a JSON text sequence (RFC 7464)
_BETWEEN = re.compile(r"[\s,\[\]\x1e\ufeff]*")  # allowed between two JSON values
_DELIMITERS = ",;\t|"
_SEP_LINE = re.compile(r"sep=(.)\s*", re.IGNORECASE)
_FLOAT_ID = re.compile(r"-?[0-9]{1,15}\.0+", re.ASCII)
_EXACT = float(1 << 53)  # floats below this represent integers exactly
_WHOLE_ID = re.compile(r"-?[0-9]{1,15}(\.0+)?", re.ASCII)

RawRow = tuple[int, dict[str, object] | str]  # row number from 1; values, or the reason for none


def read_chunk(file: InputFile, chunk: Chunk, columns: Columns, notes: Notes) -> Iterator[RawRow]:
    """A chunk's raw rows and their numbers. Raises DataError or one of UNREADABLE."""
    if file.kind == "parquet":
        with open_binary(file.url) as stream:
            yield from _read_parquet(stream, chunk, columns)
        return
    with open_chunk(file, chunk) as stream:
        if file.kind == "csv":
            yield from _read_csv(stream, file, columns, notes)
        elif file.kind == "json":
            yield from _read_values(stream)
        else:
            yield from _read_jsonl(stream, chunk.first_row)


def _read_jsonl(stream: IO[bytes], first_row: int) -> Iterator[RawRow]:
    """Read JSONL, numbered by line. Blank lines are counted but skipped."""
    number = first_row - 1
    while line := stream.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            while (rest := stream.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield number, f"the line is longer than {MAX_LINE >> 20} MiB"
        elif line.strip():
            yield number, _parse_json(line)


def _parse_json(line: bytes) -> dict[str, object] | str:
    """A line's object. orjson is three times as fast as `json`, which decides where the two may
    differ: about what orjson refuses, and about integers beyond 64 bits, which it makes floats."""
    try:
        value = orjson.loads(line)
    except ValueError:
        return _parse_slowly(line)
    if not isinstance(value, dict):
        return "the line is not a JSON object"
    for item in value.values():
        if type(item) is float and not -_EXACT <= item <= _EXACT:
            return _parse_slowly(line)
    return value


def _parse_slowly(line: bytes) -> dict[str, object] | str:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "the line is not valid UTF-8"
    except (ValueError, RecursionError):
        # Concatenated files have byte-order marks inside; a text sequence has a mark per line.
        bare = line.removeprefix(_RECORD).removeprefix(codecs.BOM_UTF8)
        return "the line is not valid JSON" if bare == line else _parse_slowly(bare)
    return value if isinstance(value, dict) else "the line is not a JSON object"


def _read_values(stream: IO[bytes]) -> Iterator[RawRow]:
    """Read JSON values, numbered by value: those of an array or a sequence, over any lines.

    Reading cannot continue after a broken value, so that raises DataError for the file.
    """
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    decoder = json.JSONDecoder()
    buffer, at, number, depth, ended = "", 0, 0, 0, False
    while True:
        between = _BETWEEN.match(buffer, at)
        assert between is not None  # the pattern also matches the empty string
        depth += between[0].count("[") - between[0].count("]")
        at = between.end()
        try:
            value, at = decoder.raw_decode(buffer, at)
        except RecursionError:
            raise DataError(f"value {number + 1} of its JSON is nested too deeply") from None
        except ValueError:
            if ended and at == len(buffer) and not depth:
                return
            if ended or len(buffer) - at > MAX_LINE:
                raise DataError(f"its JSON is broken after {number} values") from None
            more = text.read(_BLOCK)
            buffer, at, ended = buffer[at:] + more, 0, not more
            continue
        number += 1
        yield number, value if isinstance(value, dict) else "the value is not a JSON object"


def _read_parquet(stream: IO[bytes], chunk: Chunk, columns: Columns) -> Iterator[RawRow]:
    table = pq.ParquetFile(stream)
    layout = columns.layout(tuple(table.schema_arrow.names))
    names = layout.columns
    number = chunk.first_row
    groups = list(range(chunk.start, chunk.end))
    rows = sum(table.metadata.row_group(group).num_rows for group in groups)
    layout.uses += rows
    if not names:
        yield from ((number + offset, {}) for offset in range(rows))
        return
    for batch in table.iter_batches(batch_size=2048, row_groups=groups, columns=names):
        values = [_values(batch.column(name)) for name in names]
        for offset, cells in enumerate(zip(*values, strict=True)):
            yield number + offset, dict(zip(names, cells, strict=True))
        number += batch.num_rows


def _values(array: pa.Array) -> list[object]:
    """Python values; times as epoch milliseconds, because nanoseconds have no datetime."""
    arrow_type = array.type
    if pa.types.is_date(arrow_type):
        array = array.cast(pa.timestamp("ms"))
        arrow_type = array.type
    if pa.types.is_timestamp(arrow_type):
        per_ms = {"s": None, "ms": 1, "us": 1_000, "ns": 1_000_000}[arrow_type.unit]
        ticks = array.cast(pa.int64()).to_pylist()
        return [
            None if tick is None else EpochMs(tick * 1_000 if per_ms is None else tick // per_ms)
            for tick in ticks
        ]
    try:
        return list(array.to_pylist())
    except ValueError:  # includes UnicodeDecodeError: find the bad values
        return [_value(scalar) for scalar in array]


def _value(scalar: pa.Scalar) -> object:
    try:
        return scalar.as_py()
    except ValueError:
        return _BAD_TEXT


class _Lines:
    """Lines that can be pushed back, so that a bad CSV record costs only its first line."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self._again, self.used = lines, deque[str](), list[str]()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.used.append(line)
        return line

    def hand_back(self) -> None:
        """Push back all but the first line used since the last record."""
        self._again.extendleft(reversed(self.used[1:]))


def _read_csv(
    stream: IO[bytes], file: InputFile, columns: Columns, notes: Notes
) -> Iterator[RawRow]:
    """Read CSV, numbered by record after the header. An empty cell is a missing value."""
    records = _csv_records(stream, columns)
    header = next(records, None)
    if header is None:
        return
    names = header[1]
    assert not isinstance(names, str)  # the header is first
    layout = columns.layout(tuple(names))
    wanted = [(name, names.index(name)) for name in layout.columns]
    user_id = layout.sources.get("user_id")
    prompt, completion = layout.sources.get("prompt"), layout.sources.get("completion")
    floats: bool | None = None  # whether the user ids are a column of floats
    for number, record in records:
        if isinstance(record, str):
            yield number, record
            continue
        if record == names:  # from concatenated files
            notes["header_again", file.name] += 1
            continue
        layout.uses += 1
        row: dict[str, object] = {name: record[at] for name, at in wanted if record[at]}
        if prompt is not None and completion in row:
            row.setdefault(prompt, "")  # an empty prompt is valid
        if user_id in row and _FLOAT_ID.fullmatch(cell := str(row[user_id])):
            if floats is None:
                with open_content(file) as again:
                    floats = _are_floats(_csv_records(again, columns), names.index(user_id))
            if floats:
                row[user_id] = cell.partition(".")[0]
                notes["number_id", "float"] += 1
        yield number, row


def _are_floats(records: Iterator[tuple[int, list[str] | str]], position: int) -> bool:
    """Whether a column has only whole numbers. Then "7.0" stands for 7: a table with gaps turns
    integers into floats."""
    next(records)
    cells = (record[position] for _, record in records if not isinstance(record, str))
    return all(_WHOLE_ID.fullmatch(cell) for cell in cells if cell)


def _csv_records(stream: IO[bytes], columns: Columns) -> Iterator[tuple[int, list[str] | str]]:
    """The header as record 0, then the records from 1 on, each as cells or as the reason for
    none."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(_MAX_FIELD)
    first, delimiter, skip = _csv_form(text, columns)
    lines = _Lines(chain([first], text))
    records = csv.reader(lines, strict=True, delimiter=delimiter, skipinitialspace=skip)
    width = number = 0
    while True:
        lines.used.clear()
        try:
            record = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            if not width:
                raise DataError("the header is not a CSV record") from error
            lines.hand_back()
            number += 1
            yield number, f"not a CSV record: {str(error).split('(')[0].strip()}"
            continue
        if not record:
            continue
        if not width:
            width = len(record)
            yield 0, record
            continue
        number += 1
        if record[0].startswith(_MARK):
            record[0] = record[0].removeprefix(_MARK)
        if len(record) != width:
            yield number, f"the record has {len(record)} fields, the header {width}"
        else:
            yield number, record


def _csv_form(text: Iterator[str], columns: Columns) -> tuple[str, str, bool]:
    """The header's line, the delimiter with which it has the most known columns, and whether blanks
    follow the delimiter."""
    delimiters = _DELIMITERS
    for line in text:
        if stated := _SEP_LINE.fullmatch(line):
            delimiters = stated[1]
            continue
        if not line.strip():
            continue
        delimiter = max(delimiters, key=partial(_columns_found, line, columns))
        rest = line.rstrip("\r\n").split(delimiter)[1:]
        return line, delimiter, bool(rest) and all(cell.startswith(" ") for cell in rest)
    return "", ",", False


def _columns_found(line: str, columns: Columns, delimiter: str) -> int:
    try:
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
        return len(columns.layout(tuple(cells)).sources)
    except (csv.Error, DataError):
        return 0


def describe(file: InputFile) -> str:
    """Describe a file by its columns or its first bytes; "" if it cannot be read."""
    try:
        if file.kind == "parquet":
            with open_binary(file.url) as stream:
                return _columns_text(pq.read_schema(stream).names)
        with open_content(file) as stream:
            head = stream.read(_BLOCK)
    except UNREADABLE:
        return ""
    names = _first_names(file, head)
    text = _columns_text(names) if names else f"it begins with {head[:40]!r}"
    try:
        head[:-4].decode("utf-8")  # without the end, which may be within a character
    except UnicodeDecodeError as error:
        if error.start < len(head) - 8:
            text += f"; it is not UTF-8 (byte {head[error.start]:#04x} at {error.start})"
    return text


def _first_names(file: InputFile, head: bytes) -> Sequence[str]:
    try:
        if file.kind == "csv":
            return next(_csv_records(io.BytesIO(head), Columns()), (0, ""))[1]
        rows = _read_values(io.BytesIO(head))
        return [*next((row for _, row in rows if isinstance(row, dict)), {})]
    except DataError:
        return []


def _columns_text(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:12])
    return f"its columns are {shown}{', ...' if len(names) > 12 else ''}"
