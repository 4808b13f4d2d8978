"""Files written by other tools are read correctly, or refused with the file's name."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from partition_rows import read_files, write_jsonl

from pipelines.rows.inputs import find_files, inspect
from pipelines.rows.readers import describe
from ptuning.data import columns
from ptuning.data.columns import ColumnNames
from ptuning.errors import DataError
from ptuning.types import Example

ROWS: list[dict[str, Any]] = [
    {"user_id": "ann", "prompt": f"qué {n}", "completion": f'a, "{n}"\nb'} for n in range(10)
]
EXAMPLES = [Example(prompt=row["prompt"], completion=row["completion"]) for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def csv_text(delimiter: str = ",", header: str = "user_id,prompt,completion") -> str:
    cells = [[row["user_id"], row["prompt"], row["completion"]] for row in ROWS]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
    return "\r\n".join(delimiter.join(row) for row in [header.split(","), *quoted]) + "\r\n"


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


FILES: dict[str, bytes] = {
    "rows.jsonl": LINES.encode(),
    "rows.ndjson": LINES.encode(),
    "part-00000.json": LINES.encode(),
    "rows.json.gz": gzip.compress(LINES.encode()),
    "rows.jsonl.zst": zstd(LINES.encode()),
    "rows.jsonl.bz2": bz2.compress(LINES.encode()),
    "two-streams.jsonl.bz2": bz2.compress(LINES[:300].encode())
    + bz2.compress(LINES[300:].encode()),
    "two-streams.jsonl.zst": zstd(LINES[:300].encode()) + zstd(LINES[300:].encode()),
    "really-gzip.jsonl": gzip.compress(LINES.encode()),
    "really-zstd.csv": zstd(csv_text().encode()),
    "array.json": json.dumps(ROWS).encode(),
    "pretty-array.jsonl": json.dumps(ROWS, indent=1).encode(),
    "array-of-lines.json": ("[\n" + ",\n".join(LINES.splitlines()) + "\n]\n").encode(),
    "pretty-objects.json": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "pretty-array.json.gz": gzip.compress(json.dumps(ROWS, indent=1).encode()),
    "carriage-returns.jsonl": LINES.replace("\n", "\r").encode(),
    "text-sequence.json": "".join(f"\x1e{line}\n" for line in LINES.splitlines()).encode(),
    "powershell.jsonl": LINES.encode("utf-16"),
    "utf16-without-mark.jsonl": LINES.encode("utf-16-le"),
    "utf16-array.json": json.dumps(ROWS, indent=1).encode("utf-16"),
    "two-marks.jsonl": f"\ufeff{LINES[:0]}{LINES.splitlines()[0]}\n\ufeff".encode()
    + "".join(f"{line}\n" for line in LINES.splitlines()[1:]).encode(),
    "rows.csv": csv_text().encode(),
    "rows.csv.zst": zstd(csv_text().encode()),
    "rows.tsv": csv_text("\t").encode(),
    "rows.tsv.bz2": bz2.compress(csv_text("\t").encode()),
    "tab.csv": csv_text("\t").encode(),
    "semicolon.csv": csv_text(";").encode("utf-8-sig"),
    "bar.csv": csv_text("|").encode(),
    "sep-line.csv": f"sep=;\r\n{csv_text(';')}".encode(),
    "excel-unicode-text.csv": csv_text("\t").encode("utf-16"),
    "space-after-comma.csv": csv_text(", ").encode(),
    "upper-case-header.csv": csv_text(header="USER_ID,Prompt,COMPLETION").encode(),
    "header-again.csv": (csv_text() + "\ufeff" + csv_text().split("\r\n")[0] + "\r\n").encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_however_tools_write_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    users, bad, _ = read_files([tmp_path / name], chunk_bytes=100)
    assert (users, bad) == ({"ann": EXAMPLES}, [])


def test_every_file_of_a_folder_is_read_or_named(tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    write_jsonl(tmp_path / "notes.txt", [])
    write_jsonl(tmp_path / "part-00000", ROWS)
    listing = find_files([str(tmp_path)])
    assert [file.name for file in listing.files] == sorted(FILES)
    assert [Path(url).name for url in listing.unread] == ["notes.txt", "part-00000"]
    assert find_files([str(tmp_path / "*")]) == listing
    users, _, _ = read_files([tmp_path])
    assert len(users["ann"]) == 10 * len(FILES)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        (
            "rows.json",
            json.dumps(ROWS, indent=1).encode()[:-2],
            "its JSON is broken after 10 values",
        ),
        (
            "rows.json",
            json.dumps(ROWS, indent=1).encode()[:-30],
            "its JSON is broken after 9 values",
        ),
        ("rows.jsonl.zst", zstd(LINES.encode())[:-30], "rows.jsonl.zst"),
        ("rows.jsonl.bz2", bz2.compress(LINES.encode())[:-30], "rows.jsonl.bz2"),
        ("rows.jsonl", LINES.encode("utf-16")[:-1], "rows.jsonl"),
        ("rows.csv", b"PK\x03\x04rest", "it is a ZIP archive"),
        ("rows.csv", b"user_id,user_id,prompt\n1,2,3\n", "a column occurs twice"),
    ],
)
def test_a_file_that_breaks_off_or_is_something_else_is_named_with_the_reason(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(data)
    try:
        _, bad, _ = read_files([tmp_path / name])
        said = next(text for _, number, text in bad if number == 0)
    except DataError as error:
        said = str(error)
    assert reason in said
    assert str(tmp_path / name) in said


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.csv", b"author,text\nann,x\n", "its columns are 'author', 'text'"),
        ("a.jsonl", b'{"author": 1, "text": 2}\n', "its columns are 'author', 'text'"),
        ("a.json", b'[{"author": 1,\n "text": 2}]\n', "its columns are 'author', 'text'"),
        ("a.jsonl", b"hello\n", "it begins with b'hello\\n'"),
        (
            "a.csv",
            ("user_id,prompt,completion\n" + "ann,é,a\n" * 10).encode("cp1252"),
            "its columns are 'user_id', 'prompt', 'completion'; it is not UTF-8 (byte 0xe9 at 30)",
        ),
    ],
)
def test_a_misfit_file_is_described_by_what_it_holds(
    tmp_path: Path, name: str, data: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(data)
    (file,) = find_files([str(tmp_path / name)]).files
    assert describe(inspect(file, 1 << 20).file) == said


# --- columns ---------------------------------------------------------------------------------


def write_jsonl_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_jsonl(path.with_suffix(".jsonl"), rows)


def write_csv_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    path.with_suffix(".csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path.with_suffix(".csv")


def write_parquet_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def write_array_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path.with_suffix(".json")


WRITERS = [write_jsonl_file, write_csv_file, write_parquet_file, write_array_file]
every_format = pytest.mark.parametrize("write", WRITERS)
Writer = Callable[[Path, list[dict[str, Any]]], Path]


@every_format
def test_a_column_alias_works_in_all_formats(
    tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a", [{"login": "ann", "prompt": "q", "completion": "a"}])
    monkeypatch.setitem(columns.COLUMN_ALIASES, "user_id", ("login",))
    assert read_files([path]) == ({"ann": [Example(prompt="q", completion="a")]}, [], {})


@every_format
def test_columns_of_other_names_are_read_where_the_configuration_says_so(
    tmp_path: Path, write: Writer
) -> None:
    row = {"author": "ann", "user_id": "x", "text": "q", "Reply": "a", "day": "2024-05-01"}
    names = ColumnNames(user_id="author", prompt="text", completion="reply", timestamp="day")
    users, bad, notes = read_files([write(tmp_path / "a", [row])], names)
    expected = Example(prompt="q", completion="a", timestamp=1_714_521_600_000)
    assert (users, bad) == ({"ann": [expected]}, [])
    assert notes == {("unknown_column", "user_id"): 1}


@every_format
def test_a_column_that_is_not_read_is_named(tmp_path: Path, write: Writer) -> None:
    rows = [{"user_id": "a", "prompt": "q", "completion": "a", "created_at": "x"}] * 7
    assert read_files([write(tmp_path / "a", rows)])[2] == {("unknown_column", "created_at"): 7}


@every_format
def test_columns_that_folder_names_state_are_read(tmp_path: Path, write: Writer) -> None:
    folder = tmp_path / "in" / "user_id=ann%20b" / "Split=test" / "timestamp=2024-05-01" / "dt=5"
    folder.mkdir(parents=True)
    path = write(folder / "a", [{"prompt": "q", "completion": "a"}])
    expected = Example(prompt="q", completion="a", timestamp=1_714_521_600_000, split="test")
    for source in (tmp_path / "in", path, tmp_path / "in" / "*" / "*" / "*" / "*" / "a.*"):
        users, bad, notes = read_files([source])
        assert (users, bad) == ({"ann b": [expected]}, [])
        assert notes == {("unknown_column", "dt"): 1}


def test_an_unnamed_partition_of_hive_is_no_user(tmp_path: Path) -> None:
    folder = tmp_path / "user_id=__HIVE_DEFAULT_PARTITION__"
    folder.mkdir()
    users, bad, _ = read_files([write_jsonl(folder / "a.jsonl", [{"prompt": "q"}])])
    assert (users, bad) == ({}, [("a.jsonl", 1, "user_id is missing")])


# --- users -----------------------------------------------------------------------------------


def test_a_user_is_the_same_user_in_files_of_all_types(tmp_path: Path) -> None:
    number, uid = UUID(int=7), str(UUID(int=7))
    columns: dict[str, pa.Array] = {
        "int": pa.array([7, None]),
        "float": pa.array([7.0, None]),
        "decimal": pa.array([Decimal(7), None], pa.decimal128(38, 0)),
        "binary": pa.array([b"7", None]),
        "dictionary": pa.array(["7", None]).dictionary_encode(),
        "uuid": pa.array([number.bytes, None], pa.uuid()),
    }
    for name, ids in columns.items():
        table = pa.table({"user_id": ids, "prompt": ["q", "q"], "completion": ["a", "a"]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    write_jsonl(
        tmp_path / "a.jsonl",
        [{"user_id": id, "prompt": "q", "completion": "a"} for id in (7, "7", 7.0)],
    )
    (tmp_path / "gap.csv").write_text("user_id,prompt,completion\n7.0,q,a\n,q,a\n70.0,q,a\n")
    users, bad, notes = read_files([tmp_path])
    assert {user: len(rows) for user, rows in users.items()} == {"7": 9, uid: 1, "70": 1}
    assert {reason for _, _, reason in bad} == {"user_id is missing"}
    assert notes == {
        ("number_id", "int"): 2,
        ("number_id", "float"): 4,
        ("number_id", "Decimal"): 1,
    }


@pytest.mark.parametrize("ids", [["1.0", "1.0b"], ["v1", "1.0"], ["1.0", "2.5"]])
def test_ids_that_only_look_like_floats_are_kept(tmp_path: Path, ids: list[str]) -> None:
    rows = "".join(f"{id},q,a\n" for id in ids)
    (tmp_path / "a.csv").write_text(f"user_id,prompt,completion\n{rows}")
    assert list(read_files([tmp_path / "a.csv"])[0]) == ids


def test_a_file_of_seconds_beside_one_of_milliseconds_is_newer(tmp_path: Path) -> None:
    rows = [{"user_id": "a", "prompt": "q", "completion": "a"}]
    old = write_jsonl(
        tmp_path / "1.jsonl", [row | {"timestamp": 1_690_000_000_000} for row in rows]
    )
    new = write_jsonl(tmp_path / "2.jsonl", [row | {"timestamp": 1_714_557_600} for row in rows])
    users, _, notes = read_files([old, new])
    assert [row.timestamp for row in users["a"]] == [1_690_000_000_000, 1_714_557_600_000]
    assert notes == {("epoch_unit", "seconds"): 1}


def test_typed_times_of_parquet_are_not_taken_for_seconds(tmp_path: Path) -> None:
    times = pa.array([10**9], pa.timestamp("ms"))
    table = pa.table({"user_id": ["a"], "prompt": ["q"], "completion": ["a"], "timestamp": times})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_files([tmp_path / "a.parquet"])[0]["a"][0].timestamp == 10**9


def test_conversations_of_parquets_types_are_read(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    shapes = {
        "structs": pa.array([turns]),
        "maps": pa.array(
            [[list(turn.items()) for turn in turns]], pa.list_(pa.map_(pa.string(), pa.string()))
        ),
        "lists": pa.array([{name: [turn[name] for turn in turns] for name in turns[0]}]),
        "text": pa.array([json.dumps(turns)]),
    }
    for name, messages in shapes.items():
        table = pa.table({"user_id": ["ann"], "messages": messages})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    users, bad, _ = read_files([tmp_path])
    assert (len(users["ann"]), len(set(users["ann"])), bad) == (4, 1, [])


def test_a_file_system_that_cannot_be_reached_is_a_data_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    class Unreachable(Exception):
        """The kind of error that the client of a network file system raises."""

    def fail(*_: object, **__: object) -> None:
        raise Unreachable("no route")

    MemoryFileSystem().pipe("/away/a.jsonl", LINES.encode())
    (file,) = find_files(["memory://away/a.jsonl"]).files
    monkeypatch.setattr(MemoryFileSystem, "_open", fail)
    with pytest.raises(DataError, match=r"away/a\.jsonl: no route"):
        inspect(file, 100)
    monkeypatch.setattr(MemoryFileSystem, "isfile", fail)
    with pytest.raises(DataError, match=r"cannot be listed.*no route"):
        find_files(["memory://away/a.jsonl"])
