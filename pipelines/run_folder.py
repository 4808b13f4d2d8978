"""A run's folder in the store; only this module knows the names below `runs/<run_id>/`.

config.yaml    the resolved configuration, and the header that identifies the run
plan/          users.parquet, then plan.json: what to do with each user
done/          one record per pack, written once, which commits the pack or says how it was split
rows/          the rows of the users who train, by user key, until the run has ended
registered/    one record per pack whose users are in the registry
split/         one marker per pack that may have been split, so that these are found by listing
users/         part-0.parquet: the users table, the only file of a run with user ids
report.html    the report page
summary.json   written last: a run without it is unfinished
lock           held by the driver that works on the run (local stores)
ray/           Ray Train's state while the gang runs
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipelines.done_record import DoneRecord, SplitRecord, record_from_json
from pipelines.plan import Pack, Plan, PlannedUser, make_pack
from ptuning.errors import RunError
from ptuning.store import Store

Header = Mapping[str, str]  # identifies a run by its data, configuration and backbone
State = Literal["finished", "running", "stopped", "unfinished"]

_PLAN_SCHEMA = pa.schema(
    [
        ("user_key", pa.string()),
        ("action", pa.string()),  # train, judge, or the status of one who is skipped
        ("pack", pa.int32()),  # number of the pack, in the plan's order
        ("tokens", pa.int64()),
        *(
            (name, pa.string())
            for name in (
                "data_digest",
                "training_digest",
                "champion_digest",
                "candidate_digest",
                "run_id",
                "pack_id",
            )
        ),
    ]
)


class RunFolder:
    """The files of one run: `RunFolder(store, "20260101-120000-ab12").read_summary()`."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store, self.run_id = store, run_id

    def _name(self, *parts: str) -> str:
        return "/".join(["runs", self.run_id, *parts])

    # The configuration.

    def write_config(self, header: Header, config_yaml: str) -> None:
        text = yaml.safe_dump(dict(header)) + config_yaml
        self.store.write(self._name("config.yaml"), text.encode("utf-8"))

    def read_config(self) -> dict[str, Any] | None:
        """The header's keys and the configuration's sections; None if the run never started."""
        if not self.store.exists(self._name("config.yaml")):
            return None
        return dict(yaml.safe_load(self.store.read(self._name("config.yaml"))))

    # The plan.

    def write_plan(self, plan: Plan) -> None:
        """Write the plan's users, then its header, which commits it."""
        table = pa.Table.from_pylist(list(_plan_rows(plan)), schema=_PLAN_SCHEMA)
        with self.store.open_write(self._name("plan", "users.parquet")) as file:
            pq.write_table(table, file, compression="zstd")
        header = {
            "packs": [pack.pack_id for pack in plan.packs],
            "judged": [pack.pack_id for pack in plan.judged],
            "users": {
                "trained": sum(len(pack.users) for pack in plan.packs),
                "judged": sum(len(pack.users) for pack in plan.judged),
                "skipped": len(plan.skipped),
            },
            "kept": plan.kept,
            "notes": list(plan.notes),
            "planned_at": plan.planned_at,
        }
        self.store.write_json(self._name("plan", "plan.json"), header)

    def read_plan_header(self) -> dict[str, Any] | None:
        """Ids of packs and counts of users, without the users; None if there is no plan."""
        name = self._name("plan", "plan.json")
        return dict(self.store.read_json(name)) if self.store.exists(name) else None

    def read_plan(self) -> Plan | None:
        header = self.read_plan_header()
        if header is None:
            return None
        source = pa.BufferReader(self.store.read(self._name("plan", "users.parquet")))
        rows = pq.read_table(source).to_pylist()
        return Plan(
            packs=_packs(header["packs"], (row for row in rows if row["action"] == "train")),
            judged=_packs(header["judged"], (row for row in rows if row["action"] == "judge")),
            skipped={row["user_key"]: row["action"] for row in rows if row["pack"] is None},
            kept=header["kept"],
            notes=tuple(header["notes"]),
            planned_at=header["planned_at"],
        )

    # Committed packs.

    def settled_packs(self) -> set[str]:
        """Ids of the packs that have a record: they are done, or split into others."""
        return self._ids("done")

    def commit(self, record: DoneRecord) -> bool:
        """Write a pack's record unless it exists; returns whether this call wrote it."""
        return self._write_record(record)

    def commit_split(self, pack: Pack, parts: Sequence[Pack]) -> bool:
        """Record that `parts` replace the pack, unless it has a record; returns whether this call
        wrote it. The marker is written first; a marker without a split record means nothing."""
        self.store.write_json(self._name("split", f"{pack.pack_id}.json"), {})
        keys = tuple(tuple(user.user_key for user in part.users) for part in parts)
        return self._write_record(SplitRecord(pack_id=pack.pack_id, parts=keys))

    def read_done(self, pack_id: str) -> DoneRecord | None:
        """The record of a pack that is done; None where there is none, or the pack was split."""
        record = self._read_record(pack_id)
        return record if isinstance(record, DoneRecord) else None

    def unfold(self, packs: Iterable[Pack]) -> list[Pack]:
        """The packs, with the parts of those that were split in their place. Reads the records of
        these only."""
        return self._unfold(packs, self.split_packs())

    def split_packs(self) -> set[str]:
        """Ids of the packs that were split, and of some that were about to be."""
        return self._ids("split")

    def _unfold(self, packs: Iterable[Pack], marked: set[str]) -> list[Pack]:
        found: list[Pack] = []
        for pack in packs:
            record = self._read_record(pack.pack_id) if pack.pack_id in marked else None
            if isinstance(record, SplitRecord):
                users = {user.user_key: user for user in pack.users}
                parts = [make_pack([users[key] for key in part]) for part in record.parts]
                found += self._unfold(parts, marked)
            else:
                found.append(pack)
        return found

    def _write_record(self, record: DoneRecord | SplitRecord) -> bool:
        return self.store.write_once(self._name("done", f"{record.pack_id}.json"), record.to_json())

    def _read_record(self, pack_id: str) -> DoneRecord | SplitRecord | None:
        name = self._name("done", f"{pack_id}.json")
        return record_from_json(self.store.read_json(name)) if self.store.exists(name) else None

    def _ids(self, folder: str) -> set[str]:
        names = self.store.list(self._name(folder))
        return {name.removesuffix(".json") for name in names if name.endswith(".json")}

    # Registered packs.

    def registered_packs(self) -> set[str]:
        """Ids of the packs whose users are registered."""
        return self._ids("registered")

    def write_registered(self, pack_id: str, held: Mapping[str, str]) -> None:
        """Record that a pack is registered. `held` are the users whose decision became pending
        because a newer run had decided about them, with the reason."""
        self.store.write_json(self._name("registered", f"{pack_id}.json"), {"held": dict(held)})

    def read_held(self, pack_id: str) -> dict[str, str]:
        """The users of a registered pack who were held, with the reason."""
        return dict(self.store.read_json(self._name("registered", f"{pack_id}.json"))["held"])

    # The results.

    def write_users(self, table: pa.Table) -> None:
        with self.store.open_write(self._name("users", "part-0.parquet")) as file:
            pq.write_table(table, file)

    def read_users(self) -> pa.Table:
        """The users table of a finished run."""
        source = pa.BufferReader(self.store.read(self._name("users", "part-0.parquet")))
        return pq.read_table(source)

    @property
    def report_path(self) -> str:
        return self.store.path(self._name("report.html"))

    def write_report(self, page: str) -> None:
        self.store.write(self._name("report.html"), page.encode("utf-8"))

    @property
    def is_finished(self) -> bool:
        return self.store.exists(self._name("summary.json"))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """The run's commit: nothing is written after it."""
        self.store.write_json(self._name("summary.json"), dict(summary))

    def read_summary(self) -> dict[str, Any] | None:
        name = self._name("summary.json")
        return dict(self.store.read_json(name)) if self.store.exists(name) else None

    # What nothing reads once training has ended: the rows of its users, and Ray Train's state.

    @property
    def rows(self) -> str:
        """The folder of the rows of the users who train, relative to the store's root."""
        return self._name("rows")

    @property
    def scratch(self) -> str:
        return self.store.path(self._name("ray"))

    def remove_scratch(self) -> None:
        self.store.remove(self._name("ray"))
        self.store.remove(self._name("rows"))

    # The driver's lock.

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Allow one driver per run, on one host; the kernel releases the lock if the driver
        dies."""
        if not self.store.is_local:
            yield
            return
        with _lock_file(self.store.path(self._name("lock")), wait=False) as file:
            if file is None:
                raise RunError(
                    "another process is working on this run",
                    seen=self.run_id,
                    fix="wait for it, or stop it and run again",
                )
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            file.flush()
            yield

    def state(self) -> State:
        """The run's state. The lock shows whether an unfinished run is `running` or `stopped`; in
        an object store, or if the driver is on another host, it is only `unfinished`."""
        if self.is_finished:
            return "finished"
        path = self.store.path(self._name("lock"))
        if not self.store.is_local or not os.path.exists(path):
            return "unfinished"
        with _lock_file(path, wait=False) as file:
            if file is None:
                return "running"
            holder = json.loads(file.read() or "{}")
        return "stopped" if holder.get("host") == socket.gethostname() else "unfinished"


def new_run_id() -> str:
    """UTC time and four random digits, so that a store's run ids sort by start time."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def all_runs(store: Store) -> list[RunFolder]:
    """Every run that was started, oldest first."""
    folders = [RunFolder(store, name) for name in store.list("runs")]
    return [folder for folder in folders if folder.read_config() is not None]


def find_unfinished(store: Store, header: Header) -> RunFolder | None:
    """The newest unfinished run with the same header, or None."""
    for name in reversed(store.list("runs")):
        folder = RunFolder(store, name)
        if folder.is_finished or (config := folder.read_config()) is None:
            continue
        if {key: config.get(key) for key in header} == dict(header):
            return folder
    return None


@contextlib.contextmanager
def lock_runs(store: Store) -> Iterator[None]:
    """A lock for finding or creating a run: only one driver at a time may do that."""
    if not store.is_local:
        yield
        return
    with _lock_file(store.path("runs.lock"), wait=True):
        yield


@contextlib.contextmanager
def _lock_file(path: str, *, wait: bool) -> Iterator[Any]:
    """Open and lock a file; gives None if another process has the lock and `wait` is false."""
    import fcntl

    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        file.seek(0)
        yield file


def _plan_rows(plan: Plan) -> Iterator[dict[str, Any]]:
    for action, packs in (("train", plan.packs), ("judge", plan.judged)):
        for number, pack in enumerate(packs):
            for user in pack.users:
                yield {**asdict(user), "action": action, "pack": number}
    for key, status in plan.skipped.items():
        yield {"user_key": key, "action": status, "pack": None}


def _packs(pack_ids: list[str], rows: Iterable[Mapping[str, Any]]) -> tuple[Pack, ...]:
    users: list[list[PlannedUser]] = [[] for _ in pack_ids]
    for row in rows:
        values = {name: row[name] for name in PlannedUser.__dataclass_fields__}
        users[row["pack"]].append(PlannedUser(**values))
    return tuple(
        Pack(pack_id=pack_id, users=tuple(pack_users))
        for pack_id, pack_users in zip(pack_ids, users, strict=True)
    )
