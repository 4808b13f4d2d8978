"""The registries that the contract suite tests: the fake, SQLite, PostgreSQL, an MLflow server.

Databases and servers are shared by all tests. Every test has separate users.
"""

from __future__ import annotations

import getpass
import glob
import hashlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ptuning.registry import (
    MemoryRegistry,
    MemoryServer,
    PackRecord,
    Registration,
    Registry,
    RegistryConfig,
    Scope,
    open_registry,
)
from ptuning.system.ports import free_port
from ptuning.types import user_key

FINGERPRINT = hashlib.sha256(b"a backbone").hexdigest()
OTHER_FINGERPRINT = hashlib.sha256(b"another backbone").hexdigest()
SCOPE = Scope("contract", FINGERPRINT, "store-of-the-contract-suite")
PASSWORD = "hush-hush"

BACKENDS = [
    "memory",
    "sqlite",
    pytest.param("postgresql", marks=pytest.mark.slow),
    pytest.param("server", marks=pytest.mark.slow),
]
MLFLOW = BACKENDS[1:]
Open = Callable[..., Any]  # open(scope=SCOPE) -> Registry


def digest_of(user: str, text: str) -> str:
    return hashlib.sha256(f"{user}/{text}".encode()).hexdigest()


def entry(user: str, text: str = "first", **changes: Any) -> Registration:
    """A rejected prefix of a user; `text` stands for its content."""
    plain = Registration(
        user_key=user,
        prefix_name="default",
        digest=digest_of(user, text),
        training_digest=f"training-{text}",
        data_digest=f"data-{text}",
        decision="rejected",
        tags={"backbone": "smollm2"},
    )
    return replace(plain, **changes)


def promoted(user: str, text: str = "first", **changes: Any) -> Registration:
    return entry(user, text, decision="promoted", **changes)


def new_user() -> str:
    return user_key(uuid.uuid4().hex)


def new_pack(**changes: Any) -> PackRecord:
    return PackRecord(run_id=f"run-{uuid.uuid4().hex}", pack_id="pack-0", **changes)


def open_at(uri: str, scope: Scope = SCOPE) -> Registry:
    config = RegistryConfig(uri=uri, experiment="contract")
    return open_registry(
        config,
        "memory://",
        namespace=scope.namespace,
        fingerprint=scope.fingerprint,
        store_id=scope.store_id,
    )


@pytest.fixture(params=BACKENDS)
def open_scope(request: pytest.FixtureRequest) -> Open:
    """`open_scope(scope)` opens a backend, the same one at each call in a test."""
    return _opener(request)


@pytest.fixture(params=MLFLOW)
def open_mlflow(request: pytest.FixtureRequest) -> Open:
    return _opener(request)


@pytest.fixture
def registry(open_scope: Open) -> Registry:
    return open_scope()


@pytest.fixture
def mlflow_registry(open_mlflow: Open) -> Any:
    return open_mlflow()


def _opener(request: pytest.FixtureRequest) -> Open:
    if request.param == "memory":
        server = MemoryServer()
        return lambda scope=SCOPE: MemoryRegistry(scope, server)
    uri = request.getfixturevalue(f"{request.param}_uri")
    return lambda scope=SCOPE: open_at(uri, scope)


def runs_of(registry: Any, pack: PackRecord) -> list[Any]:
    if isinstance(registry, MemoryRegistry):
        return [p for key, p in registry.packs.items() if key == (pack.run_id, pack.pack_id)]
    runs = registry.connection.runs
    experiment = runs.get_experiment_by_name(registry.experiment).experiment_id
    return list(runs.search_runs([experiment], f"tags.`ptuning.run_id` = '{pack.run_id}'"))


def versions_of(registry: Any, user: str) -> list[Any]:
    if isinstance(registry, MemoryRegistry):
        return registry.versions(user)
    name = registry.scope.model_name(user, "default")
    return list(registry.connection.models.search_model_versions(f"name = '{name}'"))


def decision_of(registry: Any, user: str, text: str) -> dict[str, str]:
    """What a version's tags and description say about the decision."""
    if isinstance(registry, MemoryRegistry):
        given = registry.entry(user, "default", digest_of(user, text))
        figures = {f"metric.{name}": f"{value:.6g}" for name, value in given.metrics.items()}
        gate = {"decision": given.decision, "reason": given.reason, "gate": given.gate_digest}
        return {**figures, **given.tags, **gate}
    [version] = [
        v for v in versions_of(registry, user) if v.tags["digest"] == digest_of(user, text)
    ]
    tags = dict(version.tags)
    lines = version.description.split("\n\n")
    assert lines[0] == f"{tags['decision']}: {tags['reason']}"
    figures = {name: value for name, value in tags.items() if name.startswith("metric.")}
    assert ("\n\n".join(lines[1:]) == "") == (not figures)
    for name, value in figures.items():
        assert f"| {name.removeprefix('metric.')} | {value} |" in version.description
    gate = {"decision": tags["decision"], "reason": tags["reason"], "gate": tags["gate_digest"]}
    lineage = {name: tags[name] for name in ("backbone", "method") if name in tags}
    return {**figures, **lineage, **gate}


# Databases and servers.


@pytest.fixture(scope="session")
def sqlite_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/not/yet/there/mlflow.db"


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Postgresql]:
    with start_postgresql() as server:
        yield server


@pytest.fixture(scope="session")
def postgresql_uri(postgresql: Postgresql) -> str:
    """A database for the contract suite only."""
    return postgresql.create_database("contract")


@pytest.fixture(scope="session")
def server_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's own HTTP server, on SQLite."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--default-artifact-root", str(folder / "artifacts")]
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
        try:
            _wait_until_healthy(server, f"http://127.0.0.1:{port}/health", folder / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # it leads the process group of its workers
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait(20)


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the MLflow server did not start:\n{log.read_text()[-3000:]}")


class Postgresql:
    """A PostgreSQL server on loopback, in a new folder, with a password."""

    def __init__(self, programs: Path, folder: Path, user: str | None) -> None:
        self._programs, self._folder, self._user = programs, folder, user
        self.port = free_port()

    def create_database(self, name: str) -> str:
        """Create an empty database and return its URI, without a driver, as people write it."""
        self._psql(f"CREATE DATABASE {name}")
        return f"postgresql://tuner:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        settings = f"-p {self.port} -c listen_addresses=127.0.0.1 -c fsync=off"
        settings += f" -c unix_socket_directories={self._folder}"
        self._call("pg_ctl", "-w", "-t", "60", "-l", "log", "-o", settings, "-D", "data", "start")

    def stop(self) -> None:
        self._call("pg_ctl", "-w", "-D", "data", "-m", "immediate", "stop")

    def initialise(self) -> None:
        (self._folder / "password").write_text(PASSWORD)
        self._call(
            *("initdb", "-D", "data", "-U", "tuner", "-A", "scram-sha-256", "--no-sync"),
            *("--pwfile", "password", "-E", "UTF8", "--locale", "C"),
        )

    def _psql(self, command: str) -> None:
        place = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "tuner", "-d", "postgres"]
        self._call("psql", "-q", *place, "-c", command)

    def _call(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            cwd=self._folder,
            user=self._user,
            group=None if self._user is None else pwd.getpwnam(self._user).pw_gid,
            extra_groups=None if self._user is None else [],
            env={"PATH": os.environ["PATH"], "PGPASSWORD": PASSWORD, "LC_ALL": "C"},
            # A file, not a pipe: the server inherits the output and would keep a pipe open.
            stdout=(self._folder / "output").open("ab"),
            stderr=subprocess.STDOUT,
            check=False,
            timeout=120,
        )
        if done.returncode:
            pytest.fail(f"{program}: {(self._folder / 'output').read_text()[-2000:]}")


@contextmanager
def start_postgresql() -> Iterator[Postgresql]:
    """Run a server for the block. Skips the test if PostgreSQL is not installed."""
    programs = _postgresql_programs()
    # PostgreSQL refuses to run as root, and other users cannot enter pytest's folders.
    user = next((u for u in ("postgres", "nobody") if _exists(u)), None) if _is_root() else None
    if _is_root() and user is None:
        pytest.skip("PostgreSQL does not run as root, and there is no other user")
    folder = Path(tempfile.mkdtemp(prefix="ptuning-postgresql-"))
    try:
        if user is not None:
            shutil.chown(folder, user)
        server = Postgresql(programs, folder, user)
        server.initialise()
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _postgresql_programs() -> Path:
    found = shutil.which("initdb")
    candidates = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), reverse=True)
    candidates += [found] if found else []
    if not candidates:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg2")
    return Path(candidates[0]).resolve().parent


def _is_root() -> bool:
    return getpass.getuser() == "root" or os.geteuid() == 0


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True
