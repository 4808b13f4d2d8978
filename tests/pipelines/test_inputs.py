"""All formats give the same rows. Bad rows and unusable files are named with the reason."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from partition_rows import (
    CONFIG,
    HOSTILE,
    KEYS,
    SMALL,
    Raw,
    expected_users,
    make_rows,
    read_all,
    read_index_rows,
    read_quarantine,
    write_jsonl,
)

from pipelines.rows.inputs import Inspected, find_files, inspect
from pipelines.rows.partition import make_partition
from pipelines.rows.readers import RawRow, read_chunk
from ptuning.data.columns import Columns
from ptuning.data.encode import Template
from ptuning.data.examples import DataConfig
from ptuning.data.values import Notes
from ptuning.errors import DataError
from ptuning.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def read(item: Inspected) -> list[list[RawRow]]:
    """The raw rows of each chunk."""
    return [list(read_chunk(item.file, chunk, Columns(), Notes())) for chunk in item.chunks]


def write_formats(folder: Path, rows: list[Raw]) -> list[Path]:
    """Write the same rows in every format, with times in different notations."""
    folder.mkdir()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode()
    (folder / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    names = list(rows[0])
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "rows.csv.gz").write_bytes(gzip.compress((folder / "rows.csv").read_bytes()))
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in names}
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=37)
    times = [datetime.fromtimestamp(time / 1000, UTC) for time in columns["timestamp"]]
    zoned = pa.table(columns | {"timestamp": pa.array(times, pa.timestamp("ns", "Asia/Tokyo"))})
    pq.write_table(zoned, folder / "zoned.parquet")
    iso = [row | {"timestamp": time.isoformat()} for row, time in zip(rows, times, strict=True)]
    write_jsonl(folder / "iso.jsonl", iso)
    return sorted(folder.iterdir())


def test_every_format_gives_the_same_index(
    ray_session: None, tmp_path: Path, template: Template
) -> None:
    # An id of spaces only is a separate user in every format. Not all CSV tools keep a NUL.
    rows = make_rows([f"u{n}" for n in range(20)] + [id for id in HOSTILE if "\x00" not in id])
    indexes = []
    for file in write_formats(tmp_path / "in", rows):
        store = Store(tmp_path / "stores" / file.name)
        made = make_partition([str(file)], store, CONFIG, template, KEYS, sizes=SMALL)
        assert made.rows_read == len(rows), file.name
        assert read_all(store, made) == expected_users(rows), file.name
        indexes.append(read_index_rows(store, made))
    assert all(index == indexes[0] for index in indexes)


def write_bad_rows(folder: Path) -> list[tuple[str, int, str]]:
    """Write files with one bad row for each reason, and return the expected quarantine."""
    folder.mkdir()
    good = [json.dumps(row).encode() for row in make_rows(["a", "b"], each=50)]
    bad: list[tuple[bytes, str]] = [
        (b'{"user_id": "a", ', "the line is not valid JSON"),
        (b"[1]", "the line is not a JSON object"),
        (b'{"user_id": "\xff"}', "the line is not valid UTF-8"),
        (
            b'{"user_id": [], "prompt": "p", "completion": "c"}',
            "user_id is not a string but a list",
        ),
        (b'{"user_id": "\\ud800", "prompt": "p", "completion": "c"}', "user_id is not valid UTF-8"),
        (b'{"prompt": "p", "completion": "c"}', "user_id is missing"),
        (
            json.dumps({"user_id": "a", "prompt": "p", "completion": "x" * 600}).encode(),
            "the row does not fit into the maximum length even without its prompt's text",
        ),
    ]
    lines = [*good[:40], b"", *(line for line, _ in bad), *good[40:]]  # an empty line is not a row
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    expected = [("a.jsonl", 42 + n, reason) for n, (_, reason) in enumerate(bad)]

    (folder / "b.csv").write_bytes(
        b"user_id,prompt,completion\n"
        b"c,ok,ok\n"
        b'c,"never closed,ok\n'
        b"c,\xff,ok\n"
        b"c,one,two,three\n"
        b'c,"two\nlines",ok\n'
        b",ok,ok\n"
        b"c,,ok\n"
    )
    expected += [
        ("b.csv", 2, "not a CSV record: ',' expected after '\"'"),
        ("b.csv", 3, "prompt is not valid UTF-8"),
        ("b.csv", 4, "the record has 4 fields, the header 3"),
        ("b.csv", 6, "user_id is missing"),
    ]

    broken = pa.StringArray.from_buffers(
        2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"d\xff")
    )
    columns = {"user_id": ["d", "d"], "prompt": broken, "completion": ["c", "c"]}
    pq.write_table(pa.table(columns), folder / "c.parquet")
    expected.append(("c.parquet", 2, "prompt is not valid UTF-8"))
    return sorted(expected)


def test_bad_rows_are_quarantined_with_file_row_and_reason(
    ray_session: None, tmp_path: Path, store: Store, template: Template
) -> None:
    expected = write_bad_rows(tmp_path / "in")
    config = DataConfig(max_bad_fraction=0.2)
    made = make_partition([str(tmp_path / "in")], store, config, template, KEYS, sizes=SMALL)
    assert read_quarantine(store, made.partition_id) == expected
    assert made.rows_quarantined == len(expected)
    assert made.rows_kept == made.rows_read - len(expected) == 104
    users = read_all(store, made)
    assert {user: len(rows) for user, rows in users.items()} == {"a": 50, "b": 50, "c": 3, "d": 1}
    assert {row.prompt for row in users["c"]} == {"ok", "two\nlines", ""}


def test_conversations_are_kept_turn_by_turn(
    ray_session: None, tmp_path: Path, store: Store, template: Template
) -> None:
    turns = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    rows = [
        {"user_id": "a", "messages": turns, "timestamp": n, "init_words": "w"} for n in range(9)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl", rows)
    cells = [row | {"messages": json.dumps(turns)} for row in rows]
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(cells)
    made = make_partition([str(tmp_path / "*.*")], store, CONFIG, template, KEYS, sizes=SMALL)
    (examples,) = read_all(store, made).values()
    assert len(examples) == made.rows_read == 27
    assert len({replace(example, timestamp=0, split=None) for example in examples}) == 1
    assert [vars(turn) for turn in examples[0].messages or ()] == turns


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing.jsonl", "no input file there"),
        (lambda folder: folder / "*.csv", "no input file there"),
        (lambda folder: folder, "no input file there"),
        (lambda folder: write_jsonl(folder / "a.txt", []), "the file's format is not supported"),
        (lambda folder: write_jsonl(folder / "a.jsonl", []), "the inputs contain no rows"),
        (lambda folder: write_jsonl(folder / "a.parquet", []), "an input file cannot be read"),
        (lambda folder: write_jsonl(folder / "a.csv.gz", [{}]), "an input file cannot be read"),
        (lambda folder: "s3x://bucket/a.jsonl", "this kind of input cannot be read"),
    ],
)
def test_inputs_that_cannot_be_used_fail_with_a_reason(
    ray_session: None, tmp_path: Path, store: Store, template: Template, make: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make_partition([str(make(tmp_path))], store, CONFIG, template, KEYS, sizes=SMALL)


def test_a_gzip_file_that_breaks_off_fails_and_names_the_file(
    ray_session: None, tmp_path: Path, store: Store, template: Template
) -> None:
    whole = gzip.compress(write_jsonl(tmp_path / "x", make_rows(["a"], each=500)).read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        make_partition([str(tmp_path / "a.jsonl.gz")], store, CONFIG, template, KEYS, sizes=SMALL)


def test_a_file_named_twice_is_read_once_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b[1].csv", "sub/c.parquet", "_tmp/d.jsonl", ".e.jsonl", "f.txt"):
        write_jsonl(tmp_path / name, [])
    sources = [str(tmp_path), str(tmp_path / "a.jsonl"), str(tmp_path / "b[1].csv")]
    listing = find_files(sources)
    assert [file.name for file in listing.files] == ["a.jsonl", "b[1].csv", "c.parquet"]
    assert listing.unread == (str(tmp_path / "f.txt"),)


def test_files_behind_a_uri_are_read_as_local_ones_are(tmp_path: Path) -> None:
    import fsspec

    memory, rows = fsspec.filesystem("memory"), make_rows(["a"], each=9)
    names = [file.name for file in write_formats(tmp_path / "in", rows)]
    for name in names:
        memory.pipe(f"/uri-test/sub/{name}", (tmp_path / "in" / name).read_bytes())
    for source in ("memory://uri-test", "memory://uri-test/sub/*.*"):
        files = find_files([source]).files
        assert [file.name for file in files] == names
        for file in files:
            assert file.url.startswith("memory://")
            local = inspect(find_files([str(tmp_path / "in" / file.name)]).files[0], 100)
            remote = inspect(file, 100)
            assert remote.chunks == local.chunks
            assert read(remote) == read(local)


@pytest.mark.parametrize("chunk_bytes", [1, 10, 64, 1 << 20])
def test_chunks_of_a_file_are_its_lines_each_once(tmp_path: Path, chunk_bytes: int) -> None:
    text = "".join(json.dumps({"user_id": "x" * (n % 50)}) + "\n" * (n % 3) for n in range(1, 60))
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    (file,) = find_files([str(path)]).files
    item = inspect(file, chunk_bytes)
    assert [one.end for one in item.chunks[:-1]] == [one.start for one in item.chunks[1:]]
    rows = [row for chunk in read(item) for row in chunk]
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line]
    assert [number for number, _ in rows] == [number for number, _ in lines]
