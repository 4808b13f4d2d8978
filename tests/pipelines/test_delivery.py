"""Deliveries add up, and a run reads, indexes and trains what changed."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from partition_rows import (
    KEYS,
    Raw,
    expected_users,
    make_rows,
    read_all,
    read_index_rows,
    write_jsonl,
)

from pipelines.rows.manifest import read_delivered, record_delivery
from pipelines.rows.partition import Sizes, make_partition
from pipelines.rows.stored import Partition
from ptuning.data.encode import Template
from ptuning.data.examples import DataConfig
from ptuning.errors import DataError
from ptuning.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

APPEND, SNAPSHOT = DataConfig(), DataConfig(delivery="snapshot")
SIZES = Sizes(chunk_bytes=2000, bucket_rows=100)


class Deliveries:
    """A store that gets deliveries; the counts are what the last one cost."""

    def __init__(self, store: Store, template: Template) -> None:
        self.store, self.template = store, template
        self.read = self.inspected = 0
        self.new_index_files = 0

    def deliver(
        self, *sources: Path, config: DataConfig = APPEND, series: str = "default"
    ) -> Partition:
        self.read = self.inspected = 0

        def note(stage: str, done: int, total: int) -> None:
            if stage == "read":
                self.read = done
            if stage == "inspect":
                self.inspected = total

        before = set(self.store.list("partitions/index"))
        made = make_partition(
            [str(source) for source in sources],
            self.store,
            config,
            self.template,
            KEYS,
            series=series,
            progress=note,
            sizes=SIZES,
        )
        record_delivery(self.store, series, made.partition_id, made.delivered, config.delivery)
        self.new_index_files = len(set(self.store.list("partitions/index")) - before)
        return made

    def check(self, made: Partition, rows: list[Raw], fresh: Path, *sources: Path) -> None:
        """The partition is that of these rows, and of the sources in a store of their own."""
        assert read_all(self.store, made) == expected_users(rows)
        assert made.rows_read == len(rows)
        store = Store(fresh)
        files = [str(source) for source in sources]
        again = make_partition(files, store, SNAPSHOT, self.template, KEYS, sizes=SIZES)
        assert read_index_rows(store, again) == read_index_rows(self.store, made)
        assert again.partition_id == made.partition_id


@pytest.fixture
def deliveries(ray_session: None, store: Store, template: Template) -> Deliveries:
    return Deliveries(store, template)


def test_what_changed_in_the_files_is_read_and_what_changed_for_users_is_indexed(
    deliveries: Deliveries, tmp_path: Path
) -> None:
    """Rows deleted, corrected, moved between files, late rows, and a file's copy."""
    folder, each = tmp_path / "in", 8
    files = {
        name: make_rows([f"{name}{n}" for n in range(20)], each=each) for name in ("a", "b", "c")
    }

    def write(name: str) -> Path:
        return write_jsonl(folder / f"{name}.jsonl", files[name])

    def rows() -> list[Raw]:
        return [row for rows in files.values() for row in rows]

    paths = [write(name) for name in files]
    made = deliveries.deliver(folder)
    assert (deliveries.read, made.users, made.earlier_files) == (480, 60, 0)
    deliveries.check(made, rows(), tmp_path / "fresh0", folder)

    files["a"].append(make_rows(["a3"], each=1)[0] | {"prompt": "late", "timestamp": 5})
    made = deliveries.deliver(write("a"))
    assert deliveries.read < 40, "only the last chunk of one file"
    assert deliveries.new_index_files == 1
    assert (made.earlier_files, made.shrunk) == (2, 0)
    deliveries.check(made, rows(), tmp_path / "fresh1", folder)

    files["b"][10] = files["b"][10] | {"completion": "corrected"}
    del files["b"][-1]
    made = deliveries.deliver(write("b"))
    assert 0 < deliveries.read < 160
    assert made.shrunk == 1
    deliveries.check(made, rows(), tmp_path / "fresh2", folder)

    files["c"].append(files["a"].pop(0))
    made = deliveries.deliver(write("a"), write("c"))
    assert made.shrunk == 0, "the row is in another file now"
    deliveries.check(made, rows(), tmp_path / "fresh3", folder)

    copy = write_jsonl(tmp_path / "again" / "copy.jsonl", files["c"])
    again = deliveries.deliver(copy)
    assert deliveries.read == 0
    assert again.partition_id == made.partition_id
    assert "copied_file" in [one.kind for one in again.notices]
    deliveries.check(again, rows(), tmp_path / "fresh4", *paths)


def test_absence_removes_nobody_unless_the_input_is_a_snapshot(
    deliveries: Deliveries, tmp_path: Path
) -> None:
    first = write_jsonl(tmp_path / "1.jsonl", make_rows(["ann", "bob"], each=8))
    second = write_jsonl(tmp_path / "2.jsonl", make_rows(["bob"], each=9, start=10**12))
    deliveries.deliver(first)
    made = deliveries.deliver(second)
    assert (made.users, made.files, made.earlier_files, made.shrunk) == (2, 2, 1, 0)
    assert {
        entry["user_id"]: entry["rows"] for entry in read_index_rows(deliveries.store, made)
    } == {
        "ann": 8,
        "bob": 17,
    }
    made = deliveries.deliver(second, config=SNAPSHOT)
    assert (made.users, made.files, made.earlier_files, made.shrunk) == (1, 1, 0, 2)
    assert deliveries.read == 0, "it is known"
    made = deliveries.deliver(first)
    assert (made.users, made.files) == (2, 2), "to the snapshot, not to what was before"


def test_prefixes_of_another_name_have_deliveries_of_their_own(
    deliveries: Deliveries, tmp_path: Path
) -> None:
    sources = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", make_rows([name], each=8))
        for name in ("mail", "chat")
    }
    for name, source in sources.items():
        part = deliveries.deliver(source, series=name)
        assert [entry["user_id"] for entry in read_index_rows(deliveries.store, part)] == [name]
        assert part.earlier_files == part.shrunk == 0


def test_a_file_whose_stamp_is_known_is_not_opened(deliveries: Deliveries, tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "in" / "1.jsonl", make_rows(["ann"], each=8))
    os.utime(first, (10**9, 10**9))
    deliveries.deliver(tmp_path / "in")
    write_jsonl(tmp_path / "in" / "2.jsonl", make_rows(["bob"], each=8))
    stat = first.stat()
    first.write_text("{}\n" * (stat.st_size // 3) + "\n" * (stat.st_size % 3))
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if it had not changed
    made = deliveries.deliver(tmp_path / "in")
    assert (deliveries.inspected, deliveries.read, made.users) == (1, 8, 2)
    os.utime(first)
    with pytest.raises(DataError, match="every row of an input file is bad"):
        deliveries.deliver(tmp_path / "in")


def test_other_columns_read_again_what_was_delivered_and_need_its_files(
    deliveries: Deliveries, tmp_path: Path
) -> None:
    rows = [row | {"other": f"x{row['user_id']}"} for row in make_rows(["ann"], each=8)]
    first = write_jsonl(tmp_path / "1.jsonl", rows)
    second = write_jsonl(tmp_path / "2.jsonl", make_rows(["bob"], each=8))
    deliveries.deliver(first)
    renamed = DataConfig.model_validate({"columns": {"prompt": "other"}, "max_bad_fraction": 1})
    made = deliveries.deliver(second, config=renamed)
    assert deliveries.read == 16
    assert read_index_rows(deliveries.store, made)[0]["rows"] == 8
    first.unlink()
    with pytest.raises(DataError, match=r"1\.jsonl"):
        deliveries.deliver(second, config=DataConfig.model_validate({"columns": {"split": "x"}}))


def test_a_bad_delivery_is_refused_however_much_was_delivered_before_and_is_not_kept(
    deliveries: Deliveries, tmp_path: Path
) -> None:
    good = write_jsonl(tmp_path / "1.jsonl", make_rows([f"u{n}" for n in range(40)], each=8))
    before = deliveries.deliver(good)
    bad = write_jsonl(tmp_path / "2.jsonl", [*make_rows(["ann"], each=8), {"user_id": "ann"}])
    with pytest.raises(DataError, match="1 of 9 rows"):
        deliveries.deliver(bad)
    assert deliveries.deliver(good).partition_id == before.partition_id
    made = deliveries.deliver(bad, config=DataConfig(max_bad_fraction=0.2))
    assert (made.users, made.rows_quarantined) == (41, 1)


def users_of(deliveries: Deliveries, made: Partition) -> dict[str, int]:
    return {row["user_id"]: row["usable"] for row in read_index_rows(deliveries.store, made)}


def test_what_was_delivered_is_known_by_path_though_contents_name_the_partition(
    deliveries: Deliveries, tmp_path: Path
) -> None:
    """Copies, moves and snapshots of equal contents change which files are delivered."""
    rows = make_rows(["ann"], each=10)
    first, copy = (write_jsonl(tmp_path / n / "a.jsonl", rows) for n in ("1", "2"))
    deliveries.deliver(first, copy)
    made = deliveries.deliver(write_jsonl(first, make_rows(["bob"], each=9)))
    assert users_of(deliveries, made) == {"ann": 10, "bob": 9}, "the copy is delivered still"

    moved = write_jsonl(tmp_path / "3" / "a.jsonl", rows)
    deliveries.deliver(moved, config=SNAPSHOT)
    corrected = [rows[0] | {"completion": "better"}, *rows[1:]]
    made = deliveries.deliver(write_jsonl(moved, corrected))
    assert users_of(deliveries, made) == {"ann": 10}, "the snapshot forgot the first and the copy"


def test_a_delivery_that_is_not_recorded_is_not_kept(
    deliveries: Deliveries, template: Template, tmp_path: Path
) -> None:
    """As after a run whose plan was refused."""
    both = write_jsonl(tmp_path / "1.jsonl", make_rows(["ann", "bob"], each=8))
    deliveries.deliver(both)
    other = str(write_jsonl(tmp_path / "2.jsonl", make_rows(["ann"], each=8)))
    make_partition([other], deliveries.store, SNAPSHOT, template, KEYS)
    made = deliveries.deliver(both)
    assert users_of(deliveries, made) == {"ann": 8, "bob": 8}


def test_links_are_followed_and_names_need_not_be_utf8(
    deliveries: Deliveries, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link.jsonl").symlink_to(write_jsonl(elsewhere / "x", make_rows(["ann"], each=8)))
    write_jsonl(elsewhere / "more" / "b.jsonl", make_rows(["bob"], each=8))
    (folder / "more").symlink_to(elsewhere / "more")
    (elsewhere / "more" / "round").symlink_to(folder)
    name = os.fsdecode(b"\xff.jsonl")
    write_jsonl(folder / name, [*make_rows(["cyd"], each=30), {}])
    made = deliveries.deliver(folder)
    assert users_of(deliveries, made) == {"ann": 8, "bob": 8, "cyd": 30}
    assert deliveries.deliver(folder).partition_id == made.partition_id


def test_of_two_deliveries_at_once_none_is_lost(
    ray_session: None, store: Store, template: Template, tmp_path: Path
) -> None:
    made: dict[str, Any] = {}

    def deliver(user: str) -> None:
        source = write_jsonl(tmp_path / f"{user}.jsonl", make_rows([user], each=8))
        part = make_partition([str(source)], store, APPEND, template, KEYS)
        record_delivery(store, "default", part.partition_id, part.delivered, "append")
        made[user] = part

    threads = [threading.Thread(target=deliver, args=(f"u{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(made) == 4
    assert [Path(url).stem for url in read_delivered(store, "default").files] == [
        *("u0", "u1", "u2", "u3")
    ]
    last = make_partition([str(tmp_path / "u0.jsonl")], store, APPEND, template, KEYS)
    users = [entry["user_id"] for entry in read_index_rows(store, last)]
    assert users == ["u0", "u1", "u2", "u3"]
