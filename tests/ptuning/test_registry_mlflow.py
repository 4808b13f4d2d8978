"""Failures specific to MLflow: kills between its calls, races, outages, reading with MLflow."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from registry_backends import (
    FINGERPRINT,
    PASSWORD,
    SCOPE,
    Open,
    Postgresql,
    digest_of,
    entry,
    new_pack,
    new_user,
    open_at,
    promoted,
    runs_of,
    versions_of,
)

from ptuning.errors import ArtifactError, ConfigError, RegistryError
from ptuning.registry import Current, MemoryRegistry, Registry, Version
from ptuning.registry.names import source_of
from ptuning.store import Store, prefix_path
from ptuning.system.ports import free_port


class Killed(Exception):
    """The process dies here."""


class Dying:
    """A client that raises Killed once `left` calls were made. Several may share the countdown."""

    def __init__(self, client: Any, left: list[int]) -> None:
        self._client, self._left = client, left

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._left[0] == 0:
                raise Killed(name)
            self._left[0] -= 1
            return method(*args, **kwargs)

        return call


def test_a_pack_killed_before_any_call_is_completed_by_registering_it_again(
    mlflow_registry: Any,
) -> None:
    runs, models = mlflow_registry.connection.runs, mlflow_registry.connection.models
    mlflow_registry.connection.workers = 1
    for step in range(60):
        users, pack = [new_user(), new_user()], new_pack(params={"p": "1"}, metrics={"m": 1.0})
        entries = [promoted(user) for user in users]
        left = [step]
        mlflow_registry.connection.runs, mlflow_registry.connection.models = (
            Dying(runs, left),
            Dying(models, left),
        )
        killed = False
        try:
            mlflow_registry.register(pack, entries)
        except Killed:
            killed = True
        finally:
            mlflow_registry.connection.runs, mlflow_registry.connection.models = runs, models
        versions = mlflow_registry.register(pack, entries)
        for user, version in zip(users, versions, strict=True):
            assert mlflow_registry.champion(user) == version
            assert [str(v.version) for v in versions_of(mlflow_registry, user)] == ["1"]
        [run] = runs_of(mlflow_registry, pack)
        assert (run.info.status, run.data.params, run.data.metrics["m"]) == (
            "FINISHED",
            {"p": "1"},
            1.0,
        )
        if not killed:
            assert step >= 12  # run 4, searches 1, two users of a model, a version, two aliases
            return
    pytest.fail("register never finished")


@contextmanager
def killed_at(registry: Any, step: int) -> Iterator[None]:
    """In the block, the process dies before the `step`-th call to the model registry."""
    models = registry.connection.models
    registry.connection.models = Dying(models, [step])
    try:
        yield
    except Killed:
        pass
    finally:
        registry.connection.models = models


def test_a_kill_while_promoting_keeps_the_old_champion_serving(mlflow_registry: Any) -> None:
    user, pack = new_user(), new_pack()
    [old] = mlflow_registry.register(new_pack(), [promoted(user, "old")])
    for step in range(20):
        with killed_at(mlflow_registry, step):
            mlflow_registry.register(pack, [promoted(user, "new")])
            break
        assert mlflow_registry.champion(user) == old
    assert mlflow_registry.champion(user).digest == digest_of(user, "new")
    assert len(versions_of(mlflow_registry, user)) == 2


def test_a_kill_while_judging_again_leaves_no_unpromoted_user_marked_as_judged(
    mlflow_registry: Any,
) -> None:
    pack, mild = new_pack(planned_at=2), {"gate_digest": "mild", "reason": "0.4 better"}
    for step in range(30):
        user = new_user()
        mlflow_registry.register(new_pack(planned_at=1), [entry(user, gate_digest="strict")])
        again = promoted(user, **mild, metrics={"nll_base_valid": 4.9})
        with killed_at(mlflow_registry, step):
            mlflow_registry.register(pack, [again])
            break
        now = mlflow_registry.current([user])[user]
        assert now.candidate.gate_digest == "strict" or now.champion == now.candidate
        mlflow_registry.register(pack, [again])
        assert mlflow_registry.champion(user).gate_digest == "mild"
        assert len(versions_of(mlflow_registry, user)) == 1
    assert step > 8
    assert mlflow_registry.champion(user).gate_digest == "mild"
    assert len(versions_of(mlflow_registry, user)) == 1


def test_figures_are_in_the_tags_metrics_and_params_of_mlflow(mlflow_registry: Any) -> None:
    user = new_user()
    pack = new_pack(params={"method": "prefix"}, metrics={"tokens_per_second": 231.5})
    given = entry(
        user,
        tags={"backbone": "smollm2", "method": "prefix"},
        metrics={"nll.base": 4.9, "nll.candidate": float("nan")},
        reason="4.2 against 4.9",
        template_digest="template",
        gate_digest="gate",
    )
    mlflow_registry.register(pack, [given])
    [version] = versions_of(mlflow_registry, user)
    assert dict(version.tags) == {
        "digest": given.digest,
        "fingerprint": FINGERPRINT,
        "template_digest": "template",
        "training_digest": "training-first",
        "data_digest": "data-first",
        "user_key": user,
        "prefix_name": "default",
        "decision": "rejected",
        "reason": "4.2 against 4.9",
        "gate_digest": "gate",
        "run_id": pack.run_id,
        "pack_id": "pack-0",
        "planned_at": "0",
        "backbone": "smollm2",
        "method": "prefix",
        "metric.nll.base": "4.9",
        "metric.nll.candidate": "nan",
    }
    assert version.description.startswith("rejected: 4.2 against 4.9\n\n| figure | value |")
    assert "| nll.base | 4.9 |" in version.description
    assert version.source == f"ptuning:/{user}/{given.digest}"
    [run] = runs_of(mlflow_registry, pack)
    assert version.run_id == run.info.run_id
    assert run.data.params == {"method": "prefix"}
    assert run.data.metrics == {"tokens_per_second": 231.5}


def test_an_alias_on_a_version_that_is_not_ours_is_an_error_not_none(mlflow_registry: Any) -> None:
    user = new_user()
    models = mlflow_registry.connection.models
    name = mlflow_registry.scope.model_name(user, "default")
    models.create_registered_model(name)
    assert mlflow_registry.champion(user) is None
    assert mlflow_registry.current([user]) == {}
    good = {"digest": digest_of(user, "x"), "fingerprint": FINGERPRINT}
    for number, tags in enumerate(
        [{}, {**good, "digest": "../" * 21 + "a"}, {**good, "fingerprint": "f" * 64}], start=1
    ):
        models.create_model_version(name, "s3://elsewhere/x", tags=tags, await_creation_for=0)
        models.set_registered_model_alias(name, "champion", str(number))
        with pytest.raises(RegistryError, match="did not register"):
            mlflow_registry.champion(user)
        with pytest.raises(RegistryError, match="did not register"):
            mlflow_registry.current([user])


def test_tags_that_a_person_added_stay_when_a_version_is_judged_again(mlflow_registry: Any) -> None:
    user = new_user()
    [version] = mlflow_registry.register(new_pack(planned_at=1), [entry(user)])
    name = mlflow_registry.scope.model_name(user, "default")
    mlflow_registry.connection.models.set_model_version_tag(name, version.version, "seen by", "Jo")
    mlflow_registry.register(new_pack(planned_at=2), [promoted(user)])
    [found] = versions_of(mlflow_registry, user)
    assert (found.tags["seen by"], found.tags["decision"]) == ("Jo", "promoted")


def test_a_name_that_is_somebody_elses_model_is_no_namespace_of_ours(mlflow_registry: Any) -> None:
    scope = replace(SCOPE, namespace=f"taken-{uuid.uuid4().hex[:20]}")
    mlflow_registry.connection.models.create_registered_model(f"{scope.namespace}.store")
    with pytest.raises(RegistryError, match="store unknown"):
        open_at(mlflow_registry.connection.uri, scope).register(new_pack(), [])


def test_packs_of_two_stores_with_one_run_id_are_two_runs(open_mlflow: Open) -> None:
    pack = new_pack(metrics={"seconds": 1.0})
    for number in range(2):
        namespace = f"ns-{uuid.uuid4().hex[:20]}"
        store = open_mlflow(replace(SCOPE, namespace=namespace))
        store.register(pack, [])
        assert len(runs_of(store, pack)) == number + 1


def test_current_reads_champions_that_are_several_versions_old(mlflow_registry: Any) -> None:
    users = [new_user() for _ in range(4)]
    expected = {}
    for index, user in enumerate(users):
        entries = [(promoted if n == index else entry)(user, f"{n}") for n in range(4)]
        versions = mlflow_registry.register(new_pack(), entries)
        expected[user] = Current(candidate=versions[3], champion=versions[index])
    mlflow_registry.connection.names_per_query = 3  # more than one query
    assert mlflow_registry.current(users) == expected


REGISTER = """
import sys
from registry_backends import new_pack, open_at, promoted
open_at(sys.argv[1]).register(new_pack(), [promoted(sys.argv[2])])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_processes_that_open_a_fresh_database_at_once_all_succeed(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "sqlite":
        database = tmp_path / "deep" / "mlflow.db"
        database.parent.mkdir()
        database.with_name("mlflow.db.new").write_bytes(b"left by a killed process")
        uri = f"sqlite:///{database}"
    else:
        uri = request.getfixturevalue("postgresql").create_database("fresh")
    users = [new_user() for _ in range(3)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", REGISTER, uri, user],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for user in users
    ]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    assert outputs == ["", "", ""]  # no logs of migrations, no warnings
    registry = open_at(uri)
    for user in users:
        champion = registry.champion(user)
        assert champion is not None
        assert champion.digest == digest_of(user, "first")


@pytest.mark.slow
def test_many_packs_at_once_on_postgresql_give_every_user_one_version(postgresql_uri: str) -> None:
    shared = [new_user() for _ in range(6)]
    packs = [[promoted(user) for user in [*shared, new_user(), new_user()]] for _ in range(4)]
    registries = [open_at(postgresql_uri) for _ in range(2)]
    assert all(registry.connection.workers > 1 for registry in registries)  # type: ignore[attr-defined]

    def register(number: int) -> list[Version]:
        return registries[number % 2].register(new_pack(), packs[number])

    with ThreadPoolExecutor(len(packs)) as pool:
        for entries, versions in zip(packs, pool.map(register, range(len(packs))), strict=True):
            assert [v.user_key for v in versions] == [e.user_key for e in entries]
            assert [v.digest for v in versions] == [e.digest for e in entries]
    for entries in packs:
        current = registries[0].current([one.user_key for one in entries])
        for one in entries:
            champion = current[one.user_key].champion
            assert champion is not None
            assert champion.digest == one.digest
    # Packs that raced for one user may register a digest twice. Readers treat both as one.
    for user in shared:
        assert {v.tags["digest"] for v in versions_of(registries[0], user)} == {
            digest_of(user, "first")
        }


@pytest.mark.parametrize("verb", ["register", "set_alias"])
def test_an_alias_that_another_writer_set_first_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """MLflow looks an alias up and then inserts it. PostgreSQL lets one of two writers do so."""
    registry: Any = open_at(f"sqlite:///{tmp_path}/mlflow.db")
    user = new_user()
    [old] = registry.register(new_pack(), [promoted(user, "old")])
    set_alias = registry.connection.models.set_registered_model_alias
    met = []

    def race(name: str, alias: str, version: str) -> None:
        met.append(alias)
        if len(met) == 1:
            raise MlflowException('duplicate key value violates "pk" (psycopg2 UniqueViolation)')
        set_alias(name, alias, version)

    monkeypatch.setattr(registry.connection.models, "set_registered_model_alias", race)
    if verb == "register":
        [new] = registry.register(new_pack(), [promoted(user, "new")])
        assert registry.champion(user) == new != old
    else:
        registry.set_alias(old, "champion")
        assert registry.champion(user) == old
    assert met[:2] == ["champion", "champion"]


# Downloading a prefix file with MLflow.

FETCH = """
import sys, mlflow
mlflow.set_tracking_uri(sys.argv[1])
print(mlflow.artifacts.download_artifacts(f"models:/{sys.argv[2]}@champion", dst_path=sys.argv[3]))
"""


def fetch(uri: str, registry: Any, user: str, store: Path | None, into: Path) -> Any:
    """Download a user's champion in a process that uses only MLflow."""
    into.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PTUNING_STORE"}
    if store is not None:
        environment["PTUNING_STORE"] = str(store)
    name = registry.scope.model_name(user, "default")
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FETCH, uri, name, str(into)],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_mlflow_finds_a_champion_in_the_readers_own_store_wherever_it_was_moved(
    mlflow_registry: Any, tmp_path: Path
) -> None:
    if not entry_points(group="mlflow.artifact_repository", name="ptuning"):
        pytest.skip("ptuning is not installed, so that MLflow cannot find its plugin")
    user, data = new_user(), b"a prefix"
    digest = hashlib.sha256(data).hexdigest()
    Store(tmp_path / "a").write(prefix_path(user, digest), data)
    mlflow_registry.register(new_pack(), [promoted(user, digest=digest)])
    (tmp_path / "a").rename(tmp_path / "moved")
    uri = mlflow_registry.connection.uri
    done = fetch(uri, mlflow_registry, user, tmp_path / "moved", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / f"{digest}.safetensors").read_bytes() == data
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [f"{digest}.safetensors"]


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """`artifacts(source)` is the artifact repository that MLflow uses for this source."""
    monkeypatch.setenv("PTUNING_STORE", str(tmp_path / "store"))
    from ptuning.registry.mlflow.artifacts import PrefixArtifacts

    return PrefixArtifacts


def test_what_is_not_a_whole_prefix_of_that_digest_is_never_handed_out(
    artifacts: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, digest = new_user(), hashlib.sha256(b"a prefix").hexdigest()
    repository = artifacts(source_of(user, digest))
    with pytest.raises(ArtifactError, match=r"no such prefix.*PTUNING_STORE"):
        repository._download_file(f"{digest}.safetensors", str(tmp_path / "out"))
    Store(tmp_path / "store").write(prefix_path(user, digest), b"another")
    with pytest.raises(ArtifactError, match="does not have the digest in the registry"):
        repository._download_file(f"{digest}.safetensors", str(tmp_path / "out"))
    with pytest.raises(ArtifactError, match="no such artifact"):
        repository._download_file("../store.json", str(tmp_path / "out"))
    monkeypatch.delenv("PTUNING_STORE")
    with pytest.raises(ConfigError, match="PTUNING_STORE is not set"):
        repository._download_file(f"{digest}.safetensors", str(tmp_path / "out"))
    for log in (repository.log_artifact, repository.log_artifacts):
        with pytest.raises(ArtifactError, match="written by a run"):
            log(str(tmp_path))
    assert not (tmp_path / "out").exists()


# Registries that cannot be reached.


@contextmanager
def http_server(status: int, body: bytes, wait: threading.Event | None = None) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if wait is not None:
                wait.wait(30)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # callers hang up
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        if wait is not None:
            wait.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def assert_every_call_raises(
    registry: Registry, uri: str, seconds: float, *, at_once: bool = False
) -> None:
    """`at_once`: the calls wait together, where each waits for seconds."""
    user = new_user()

    def check(call: Callable[[], object]) -> None:
        began = time.monotonic()
        with pytest.raises(RegistryError) as caught:
            call()
        assert time.monotonic() - began < seconds
        assert uri in str(caught.value)

    calls: list[Callable[[], object]] = [
        lambda: registry.champion(user),
        lambda: registry.current([user]),
        lambda: registry.register(new_pack(), [entry(user)]),
    ]
    with ThreadPoolExecutor(len(calls) if at_once else 1) as pool:
        list(pool.map(check, calls))


def test_a_server_that_is_down_raises_soon_and_never_reads_as_none() -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    assert_every_call_raises(open_at(uri), uri, seconds=20, at_once=True)


def test_a_server_that_never_answers_raises_after_its_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with http_server(200, b"{}", wait=threading.Event()) as uri:
        assert_every_call_raises(open_at(uri), uri, seconds=10, at_once=True)


@pytest.mark.parametrize("body", [b"<html>Not Found</html>", b'{"detail": "Not Found"}', b"[]"])
def test_a_404_of_something_that_is_not_mlflow_never_reads_as_none(body: bytes) -> None:
    with http_server(404, body) as uri:
        assert_every_call_raises(open_at(uri), uri, seconds=20)


def test_an_unreachable_fake_raises_too() -> None:
    registry = MemoryRegistry()
    registry.unreachable = True
    assert_every_call_raises(registry, "", seconds=1)


def test_a_database_that_is_down_raises_soon_and_keeps_its_password() -> None:
    pytest.importorskip("psycopg2")
    uri = f"postgresql://tuner:{PASSWORD}@127.0.0.1:{free_port()}/mlflow"
    began = time.monotonic()
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1") as caught:
        open_at(uri)
    assert time.monotonic() - began < 20
    assert PASSWORD not in str(caught.value) + repr(caught.value.fields)


def test_a_refused_request_is_no_outage(
    mlflow_registry: Any, caplog: pytest.LogCaptureFixture
) -> None:
    [version] = mlflow_registry.register(new_pack(), [promoted(new_user())])
    caplog.set_level(logging.INFO, "ptuning.registry")
    with pytest.raises(RegistryError):
        mlflow_registry.set_alias(replace(version, version="7"), "champion")
    assert mlflow_registry.champion(version.user_key) == version
    assert not [record for record in caplog.records if record.name == "ptuning.registry"]


@pytest.mark.slow
def test_an_outage_of_the_database_is_one_line_in_the_log_and_ends_by_itself(
    postgresql: Postgresql, caplog: pytest.LogCaptureFixture
) -> None:
    registry, user = open_at(postgresql.create_database("outage")), new_user()
    [version] = registry.register(new_pack(), [promoted(user)])
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    postgresql.stop()
    try:
        for _ in range(3):
            assert_every_call_raises(registry, "127.0.0.1", seconds=20)
    finally:
        postgresql.start()
    [line] = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert line.startswith("could not look up a champion at postgresql")
    assert "\n" not in line
    assert PASSWORD not in caplog.text
    assert registry.champion(user) == version
    assert "answers again" in caplog.records[-1].getMessage()


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("a note, not a database, and long enough to be read as one" * 20)
    with pytest.raises(RegistryError, match=r"mlflow\.db"):
        open_at(f"sqlite:///{path}")
    assert path.read_text().startswith("a note")
