"""Published champions: the prefix that serves each user of one backbone.

A generation is one published state. `champions/<fingerprint, 8>/latest` names its files: a full
list and the changes since. A publisher writes its changes to a new file and then replaces `latest`,
unless another process has replaced it meanwhile. A reader polls that one small object and reads
only new files. The cost of publishing is proportional to the changes, since a full list is written
only when the changes have outgrown it.

In memory a reader keeps the full list as sorted columns instead of a Python object per user, so a
million users take about a hundred megabytes (infra/decisions.md), and the changes in a dictionary.
"""

from __future__ import annotations

import io
import json
import secrets
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ptuning.errors import RunError
from ptuning.store import Store

FORMAT = 1
_MIN_FULL = 1000  # so few changes never cause a new full list
_MAX_DELTAS = 100  # files of changes; a new reader reads them all
_TRIES = 50
_FORGOTTEN_S = 24 * 3600  # a replica that is silent for this long is no longer reported

Name = tuple[str, str]  # user key, prefix name


@dataclass(frozen=True)
class ChampionRef:
    """A champion: the digest of its prefix file, and its version in the registry."""

    digest: str
    version: str


Changes = Mapping[Name, ChampionRef | None]  # None: no longer a champion


@dataclass(frozen=True, kw_only=True)
class _Latest:
    """The contents of `latest`. `rows` counts those of the full list and of all deltas."""

    fingerprint: str
    generation: int = 0
    full: str | None = None
    deltas: tuple[str, ...] = ()
    rows: tuple[int, int] = (0, 0)

    @property
    def files(self) -> set[str]:
        return {*self.deltas, *([self.full] if self.full is not None else [])}

    @classmethod
    def parse(cls, data: bytes, fingerprint: str) -> _Latest:
        try:
            value = json.loads(data)
            found = cls(
                fingerprint=value["fingerprint"],
                generation=int(value["generation"]),
                full=value["full"],
                deltas=tuple(value["deltas"]),
                rows=(int(value["rows"][0]), int(value["rows"][1])),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged("latest", error) from error
        if found.fingerprint != fingerprint:  # the folder's name has only its first 8 digits
            raise _damaged("latest", ValueError(f"it is of backbone {found.fingerprint}"))
        return found

    def to_bytes(self) -> bytes:
        value = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "generation": self.generation,
            "full": self.full,
            "deltas": list(self.deltas),
            "rows": list(self.rows),
        }
        return json.dumps(value, indent=1).encode()


def publish(store: Store, fingerprint: str, changes: Changes) -> int:
    """Publish changes as a new generation of a backbone's champions; returns its number.

    Users who are not in `changes` keep their champions. Two processes that publish at the same time
    both succeed, one after the other. Without changes the current generation is returned. Raises
    RunError if other processes keep publishing faster. Example:
    `publish(store, backbone.fingerprint, {(user_key, "default"): ChampionRef(digest, "3")})`.
    """
    folder = _folder(fingerprint)
    mine: set[str] = set()  # files of refused attempts
    for _ in range(_TRIES):
        found = store.read_versioned(f"{folder}/latest")
        now = _read_latest(found, fingerprint)
        if not changes:
            return now.generation
        if mine & now.files:  # the last attempt succeeded, but its answer was lost
            return now.generation
        for name in mine:
            store.remove(name)
        new = _next(store, folder, now, changes)
        data = new.to_bytes()
        done = (
            store.put_if_absent(f"{folder}/latest", data)
            if found is None
            else store.replace_if_unchanged(f"{folder}/latest", data, found[1])
        )
        if done:
            return new.generation
        mine = new.files - now.files
    raise RunError(
        "champions could not be published",
        seen=f"other processes published {_TRIES} times meanwhile",
        expected="a moment without other publishers",
        fix="run again",
    )


def _next(store: Store, folder: str, now: _Latest, changes: Changes) -> _Latest:
    """Write the files of the generation after `now`."""
    generation = now.generation + 1
    place = f"{folder}/{generation:08d}/{secrets.token_hex(8)}"
    full_rows, delta_rows = now.rows
    outgrown = delta_rows + len(changes) > max(_MIN_FULL, full_rows // 4)
    if not outgrown and len(now.deltas) < _MAX_DELTAS:
        name = f"{place}-delta.npz"
        store.write(name, _Columns.of(changes.items()).to_bytes())
        return replace(
            now,
            generation=generation,
            deltas=(*now.deltas, name),
            rows=(full_rows, delta_rows + len(changes)),
        )
    state = _State.read(store, now)
    merged = dict(state.changes) | dict(changes)
    columns = state.full.merge(merged)
    name = f"{place}-full.npz"
    store.write(name, columns.to_bytes())
    return replace(now, generation=generation, full=name, deltas=(), rows=(len(columns.ids), 0))


def _read_latest(found: tuple[bytes, str] | None, fingerprint: str) -> _Latest:
    if found is None:
        return _Latest(fingerprint=fingerprint)
    return _Latest.parse(found[0], fingerprint)


@dataclass(frozen=True)
class _Columns:
    """Champions in columns, sorted by `ids`: user key, a dot, prefix name. An empty digest and
    version mean that there is no champion any more."""

    ids: npt.NDArray[np.bytes_]
    digests: npt.NDArray[np.uint8]  # [n, 32]
    versions: npt.NDArray[np.bytes_]

    @classmethod
    def of(cls, entries: Iterable[tuple[Name, ChampionRef | None]]) -> _Columns:
        rows = sorted((_id(name), ref) for name, ref in entries)
        digests = b"".join(
            bytes(32) if ref is None else bytes.fromhex(ref.digest) for _, ref in rows
        )
        return cls(
            np.array([name for name, _ in rows], dtype="S"),
            np.frombuffer(digests, dtype=np.uint8).reshape(len(rows), 32),
            np.array([b"" if ref is None else ref.version.encode() for _, ref in rows], dtype="S"),
        )

    @classmethod
    def read(cls, store: Store, name: str) -> _Columns:
        try:
            with np.load(io.BytesIO(store.read(name)), allow_pickle=False) as arrays:
                columns = cls(arrays["ids"], arrays["digests"], arrays["versions"])
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise _damaged(name, error) from error
        if not len(columns.ids) == len(columns.digests) == len(columns.versions):
            raise _damaged(name, ValueError("columns of unequal length"))
        return columns

    def to_bytes(self) -> bytes:
        sink = io.BytesIO()
        np.savez(sink, ids=self.ids, digests=self.digests, versions=self.versions)
        return sink.getvalue()

    def find(self, name: Name) -> ChampionRef | None:
        at = int(np.searchsorted(self.ids, _id(name)))
        if at == len(self.ids) or self.ids[at] != _id(name):
            return None
        return self._ref(at)

    def items(self) -> Iterator[tuple[Name, ChampionRef | None]]:
        for at in range(len(self.ids)):
            key, _, prefix_name = self.ids[at].decode().partition(".")
            yield (key, prefix_name), self._ref(at)

    def _ref(self, at: int) -> ChampionRef | None:
        if not self.versions[at] and not self.digests[at].any():
            return None
        return ChampionRef(self.digests[at].tobytes().hex(), self.versions[at].decode())

    def merge(self, changes: Changes) -> _Columns:
        """These champions with changes applied; unchanged ones never become Python objects."""
        unchanged = ~np.isin(self.ids, np.array([_id(name) for name in changes], dtype="S"))
        new = _Columns.of((name, ref) for name, ref in changes.items() if ref is not None)
        ids = np.concatenate([self.ids[unchanged], new.ids])
        order = np.argsort(ids, kind="stable")
        return _Columns(
            ids[order],
            np.concatenate([self.digests[unchanged], new.digests])[order],
            np.concatenate([self.versions[unchanged], new.versions])[order],
        )


def _id(name: Name) -> bytes:
    return f"{name[0]}.{name[1]}".encode("ascii")


_EMPTY = _Columns.of(())


@dataclass(frozen=True)
class _State:
    """One generation in memory."""

    latest: _Latest
    full: _Columns = _EMPTY
    changes: Changes = field(default_factory=dict)

    @classmethod
    def read(cls, store: Store, latest: _Latest, before: _State | None = None) -> _State:
        """Read a generation; files that are already in `before` are not read again."""
        full, changes, read = _EMPTY, dict[Name, ChampionRef | None](), 0
        if before is not None and before.latest.full == latest.full:
            full, known = before.full, before.latest.deltas
            if latest.deltas[: len(known)] == known:
                changes, read = dict(before.changes), len(known)
        elif latest.full is not None:
            full = _Columns.read(store, latest.full)
        for name in latest.deltas[read:]:
            changes.update(_Columns.read(store, name).items())
        return cls(latest, full, changes)


class ChampionList:
    """The champions of one backbone, as last published.

    `get` may be called from any thread while another thread refreshes; each answer comes from a
    single generation.
    """

    def __init__(self, store: Store, fingerprint: str) -> None:
        self._store, self._folder = store, _folder(fingerprint)
        self._fingerprint = fingerprint
        self._state = _State(_Latest(fingerprint=fingerprint))

    @property
    def generation(self) -> int:
        """The generation in use; 0 before the first."""
        return self._state.latest.generation

    def refresh(self) -> int:
        """Read what was published since the last call; returns the generation. If nothing is new
        this takes one read.

        Raises RunError or OSError if reading fails; the generation in use then stays.
        """
        found = self._store.read_versioned(f"{self._folder}/latest")
        latest = _read_latest(found, self._fingerprint)
        if latest != self._state.latest:
            self._state = _State.read(self._store, latest, self._state)
        return self.generation

    def get(self, user_key: str, prefix_name: str = "default") -> ChampionRef | None:
        """The user's champion with that prefix name, or None."""
        state, name = self._state, (user_key, prefix_name)
        return state.changes[name] if name in state.changes else state.full.find(name)

    def items(self) -> Iterator[tuple[Name, ChampionRef]]:
        """Every champion of the generation, in no particular order."""
        state = self._state
        for name, ref in state.changes.items():
            if ref is not None:
                yield name, ref
        for name, ref in state.full.items():
            if ref is not None and name not in state.changes:
                yield name, ref


# ---------------------------------------------------------------- acknowledgements


def acknowledge(store: Store, fingerprint: str, replica: str, generation: int, beat: int) -> None:
    """Record that a replica serves a generation; `beat` counts up while the replica is alive."""
    value = {"generation": generation, "beat": beat, "at": round(time.time())}
    store.write(f"{_folder(fingerprint)}/acks/{replica}", json.dumps(value).encode())


def withdraw(store: Store, fingerprint: str, replica: str) -> None:
    """Remove a replica that ends, so that nobody waits for it."""
    store.remove(f"{_folder(fingerprint)}/acks/{replica}")


def wait_acknowledged(
    store: Store, fingerprint: str, generation: int, timeout_s: float, every_s: float = 0.2
) -> list[str]:
    """Wait until every known replica serves `generation` or a later one; returns the names of those
    that still do not after `timeout_s`. These hang, or died without `withdraw`; they are reported
    for a day, since they may still serve an old list."""
    deadline = time.monotonic() + timeout_s
    while True:
        late = [
            name
            for name in store.list(f"{_folder(fingerprint)}/acks")
            if _acknowledged(store, fingerprint, name) < generation
        ]
        if not late or time.monotonic() >= deadline:
            return late
        time.sleep(every_s)


def _acknowledged(store: Store, fingerprint: str, replica: str) -> int:
    try:
        value: Any = json.loads(store.read(f"{_folder(fingerprint)}/acks/{replica}"))
        if time.time() - int(value["at"]) > _FORGOTTEN_S:
            withdraw(store, fingerprint, replica)
        return int(value["generation"])
    except FileNotFoundError:  # withdrawn in the meantime
        return 1 << 62
    except (ValueError, TypeError, KeyError):
        return -1


def _folder(fingerprint: str) -> str:
    return f"champions/{fingerprint[:8]}"


def _damaged(name: str, error: Exception) -> RunError:
    return RunError(
        "a published list of champions cannot be read",
        seen=f"{name}: {type(error).__name__}: {error}",
        expected="a file written by ptuning.champions.publish",
        fix="restore the store's champions/ from its backup, or deploy again",
    )
