"""The registry's contract, the same for the fake, for MLflow on SQLite and for a real server.

The SQLite database and the server are one per session; every test has users of its own.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ptuning.errors import ConfigError, RegistryError
from ptuning.registry import (
    Current,
    MemoryRegistry,
    PackRecord,
    Registration,
    Registry,
    RegistryConfig,
    open_registry,
)
from ptuning.types import user_key


class Killed(Exception):
    """The process dies here."""


class Dying:
    """A client that raises instead of its `last`-th call; several may share one countdown."""

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


def entry(user: str, text: str = "first", **changes: Any) -> Registration:
    digest = hashlib.sha256(f"{user}/{text}".encode()).hexdigest()
    plain = Registration(
        user_key=user,
        prefix_name="default",
        digest=digest,
        uri=f"file:///store/prefixes/{digest}.safetensors",
        training_digest=f"training-{text}",
        data_digest=f"data-{text}",
        tags={"backbone": "smollm2"},
    )
    return replace(plain, **changes)


def new_user() -> str:
    return user_key(uuid.uuid4().hex)


def new_pack(**changes: Any) -> PackRecord:
    return PackRecord(run_id=f"run-{uuid.uuid4().hex}", pack_id="pack-0", **changes)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="session")
def sqlite_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/not/yet/there/mlflow.db"


@pytest.fixture(scope="session")
def server_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
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
            wait_until_healthy(server, f"http://127.0.0.1:{port}/health", folder / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # our own: it leads the group of its workers
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait(20)


def wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the MLflow server did not start:\n{log.read_text()[-3000:]}")


BACKENDS = ["memory", "sqlite", pytest.param("server", marks=pytest.mark.slow)]
MLFLOW = BACKENDS[1:]


def open_backend(request: pytest.FixtureRequest) -> Registry:
    if request.param == "memory":
        return MemoryRegistry()
    uri = request.getfixturevalue(f"{request.param}_uri")
    return open_registry(RegistryConfig(uri=uri, experiment="contract"), "memory://")


@pytest.fixture(params=BACKENDS)
def registry(request: pytest.FixtureRequest) -> Registry:
    return open_backend(request)


@pytest.fixture(params=MLFLOW)
def mlflow_registry(request: pytest.FixtureRequest) -> Any:
    return open_backend(request)


def runs_of(registry: Any, pack: PackRecord) -> list[Any]:
    if isinstance(registry, MemoryRegistry):
        return [p for key, p in registry.packs.items() if key == (pack.run_id, pack.pack_id)]
    experiment = registry._runs.get_experiment_by_name(registry.experiment).experiment_id
    return list(
        registry._runs.search_runs([experiment], f"tags.`ptuning.run_id` = '{pack.run_id}'")
    )


def versions_of(registry: Any, user: str) -> list[Any]:
    if isinstance(registry, MemoryRegistry):
        return registry._models[user, "default"].versions
    return list(registry._models.search_model_versions(f"name = 'ptuning-{user}'"))


# What every registry does.


def test_is_a_registry(registry: Registry) -> None:
    assert isinstance(registry, Registry)


def test_a_user_never_registered_has_no_champion_and_is_absent_from_current(
    registry: Registry,
) -> None:
    user = new_user()
    assert registry.champion(user) is None
    assert registry.current([user]) == {}
    assert registry.current([]) == {}


def test_a_candidate_is_not_a_champion_until_promoted(registry: Registry) -> None:
    user = new_user()
    [version] = registry.register(new_pack(), [entry(user)])
    assert registry.champion(user) is None
    assert registry.current([user]) == {user: Current(candidate=version)}


def test_a_promoted_entry_comes_back_with_all_that_was_registered(registry: Registry) -> None:
    user = new_user()
    given = entry(user, promote=True)
    [version] = registry.register(new_pack(), [given])
    assert registry.champion(user) == version
    assert registry.current([user]) == {user: Current(candidate=version, champion=version)}
    assert version.version == "1"
    for name in ("user_key", "prefix_name", "digest", "uri", "training_digest", "data_digest"):
        assert getattr(version, name) == getattr(given, name)


def test_a_rejected_retraining_leaves_the_champion_where_it_was(registry: Registry) -> None:
    user = new_user()
    [old] = registry.register(new_pack(), [entry(user, "old", promote=True)])
    [new] = registry.register(new_pack(), [entry(user, "new")])
    assert registry.champion(user) == old
    assert registry.current([user]) == {user: Current(candidate=new, champion=old)}


def test_registering_a_pack_again_adds_no_version_and_no_run(registry: Registry) -> None:
    users, pack = [new_user(), new_user()], new_pack(params={"epochs": "3"}, metrics={"s": 1.5})
    entries = [entry(user, promote=True) for user in users]
    first = registry.register(pack, entries)
    assert registry.register(pack, entries) == first
    assert registry.register(replace(pack, metrics={"s": 2.5}), entries) == first
    assert len(runs_of(registry, pack)) == 1
    assert all(len(versions_of(registry, user)) == 1 for user in users)


def test_a_digest_seen_before_moves_the_aliases_back_without_a_new_version(
    registry: Registry,
) -> None:
    user = new_user()
    [old] = registry.register(new_pack(), [entry(user, "old", promote=True)])
    registry.register(new_pack(), [entry(user, "new", promote=True)])
    assert registry.register(new_pack(), [entry(user, "old", promote=True)]) == [old]
    assert registry.champion(user) == old
    assert len(versions_of(registry, user)) == 2


def test_two_entries_of_one_user_in_one_pack_are_registered_in_order(registry: Registry) -> None:
    user = new_user()
    first, second, again = registry.register(
        new_pack(), [entry(user, "a"), entry(user, "b"), entry(user, "a")]
    )
    assert (first.version, second.version) == ("1", "2")
    assert again == first
    assert registry.current([user])[user].candidate == first


def test_a_pack_without_entries_is_recorded(registry: Registry) -> None:
    pack = new_pack()
    assert registry.register(pack, []) == []
    assert len(runs_of(registry, pack)) == 1


def test_users_of_a_pack_are_never_mixed(registry: Registry) -> None:
    users = [new_user() for _ in range(12)]
    entries = [entry(user, promote=index % 2 == 0) for index, user in enumerate(users)]
    versions = registry.register(new_pack(), entries)
    assert [v.user_key for v in versions] == users
    assert [v.digest for v in versions] == [e.digest for e in entries]
    current = registry.current([*users, new_user()])
    assert set(current) == set(users)
    for index, user in enumerate(users):
        assert current[user].candidate == versions[index]
        assert current[user].champion == (versions[index] if index % 2 == 0 else None)
        assert registry.champion(user) == current[user].champion


def test_a_users_prefix_names_are_apart(registry: Registry) -> None:
    user, other = new_user(), new_user()
    [plain, mail, code] = registry.register(
        new_pack(),
        [
            entry(user, "plain", promote=True),
            entry(user, "mail", prefix_name="mail", promote=True),
            entry(user, "code", prefix_name="mail-code_2"),
        ],
    )
    registry.register(new_pack(), [entry(other, "mail", prefix_name="mail", promote=True)])
    assert registry.champion(user) == plain
    assert registry.champion(user, "mail") == mail
    assert registry.champion(user, "mail-code_2") is None
    assert registry.current([user, other], "mail-code_2") == {user: Current(candidate=code)}
    assert registry.current([user, other]) == {user: Current(candidate=plain, champion=plain)}


def test_set_alias_promotes_and_rolls_back(registry: Registry) -> None:
    user = new_user()
    [old] = registry.register(new_pack(), [entry(user, "old", promote=True)])
    [new] = registry.register(new_pack(), [entry(user, "new")])
    registry.set_alias(new, "champion")
    assert registry.champion(user) == new
    registry.set_alias(old, "champion")
    assert registry.champion(user) == old


def test_set_alias_refuses_versions_and_aliases_that_do_not_exist(registry: Registry) -> None:
    user = new_user()
    [version] = registry.register(new_pack(), [entry(user)])
    for wrong in (replace(version, version="7"), replace(version, user_key=new_user())):
        with pytest.raises(RegistryError):
            registry.set_alias(wrong, "champion")
    with pytest.raises(RegistryError, match="unknown alias"):
        registry.set_alias(version, "latest")  # type: ignore[arg-type]


HOSTILE_USERS = ["", "alice", "../../etc", "a" * 51, "A" * 52, "a" * 52 + "\n", "é" * 52]
HOSTILE_USERS += ["a" * 52 + "' OR name LIKE '%", "%" * 52]
HOSTILE_PREFIXES = ["", "-x", "A", "a/b", "a:b", "a'b", "a b", "a\n", "x" * 65, "*"]


@pytest.mark.parametrize(
    ("user", "prefix"),
    [(user, "default") for user in HOSTILE_USERS] + [("a" * 52, p) for p in HOSTILE_PREFIXES],
)
@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_hostile_names_are_refused_everywhere_and_nothing_is_written(
    kind: str, user: str, prefix: str, request: pytest.FixtureRequest
) -> None:
    uri = "memory://" if kind == "memory" else request.getfixturevalue("sqlite_uri")
    registry = open_registry(RegistryConfig(uri=uri, experiment="contract"), "")
    good = new_user()
    [version] = registry.register(new_pack(), [entry(good)]) if kind == "memory" else [None]
    calls: list[Callable[[], Any]] = [
        lambda: registry.champion(user, prefix),
        lambda: registry.current([good, user], prefix),
        lambda: registry.register(
            new_pack(), [entry(good, "second"), entry(user, prefix_name=prefix)]
        ),
    ]
    if version is not None:
        wrong = replace(version, user_key=user, prefix_name=prefix)
        calls.append(lambda: registry.set_alias(wrong, "champion"))
    for call in calls:
        with pytest.raises(RegistryError, match=r"not a (user key|prefix name)"):
            call()
    held = registry.current([good])
    assert held == ({good: Current(candidate=version)} if version else {})


def test_any_run_and_pack_id_is_only_data(registry: Registry) -> None:
    hostile = PackRecord(run_id=f"x' OR '1'='1 {uuid.uuid4()}", pack_id="p`';--/é")
    other = replace(hostile, pack_id="another")
    user = new_user()
    registry.register(hostile, [entry(user)])
    registry.register(other, [entry(user)])
    registry.register(hostile, [entry(user)])
    assert len(versions_of(registry, user)) == 1


def test_errors_survive_pickling() -> None:
    with pytest.raises(RegistryError) as caught:
        MemoryRegistry().champion("nobody")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (RegistryError, str(caught.value))


# What only MLflow can get wrong.


def test_a_pack_killed_before_any_call_is_completed_by_registering_it_again(
    mlflow_registry: Any,
) -> None:
    runs, models = mlflow_registry._runs, mlflow_registry._models
    mlflow_registry._workers = 1
    for step in range(60):
        users, pack = [new_user(), new_user()], new_pack(params={"p": "1"}, metrics={"m": 1.0})
        entries = [entry(user, promote=True) for user in users]
        left = [step]
        mlflow_registry._runs, mlflow_registry._models = Dying(runs, left), Dying(models, left)
        killed = False
        try:
            mlflow_registry.register(pack, entries)
        except Killed:
            killed = True
        finally:
            mlflow_registry._runs, mlflow_registry._models = runs, models
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


def test_a_kill_while_promoting_keeps_the_old_champion_serving(mlflow_registry: Any) -> None:
    user = new_user()
    [old] = mlflow_registry.register(new_pack(), [entry(user, "old", promote=True)])
    models, pack = mlflow_registry._models, new_pack()
    again = entry(user, "new", promote=True)
    for step in range(20):
        mlflow_registry._models = Dying(models, [step])
        try:
            mlflow_registry.register(pack, [again])
        except Killed:
            mlflow_registry._models = models
            assert mlflow_registry.champion(user) == old
        else:
            break
        finally:
            mlflow_registry._models = models
    assert mlflow_registry.champion(user).digest == again.digest
    assert len(versions_of(mlflow_registry, user)) == 2


def test_figures_are_where_a_person_looks_for_them(mlflow_registry: Any) -> None:
    user = new_user()
    pack = new_pack(params={"method": "prefix"}, metrics={"tokens_per_second": 231.5})
    given = entry(
        user,
        tags={"backbone_fingerprint": "abc", "digest": "a lie"},
        metrics={"nll.base": 4.9, "nll.candidate": float("nan")},
        description="Promoted: 4.2 against 4.9.",
    )
    mlflow_registry.register(pack, [given])
    [version] = versions_of(mlflow_registry, user)
    assert version.tags["digest"] == given.digest
    assert version.tags["backbone_fingerprint"] == "abc"
    assert version.tags["metric.nll.base"] == "4.9"
    assert version.tags["metric.nll.candidate"] == "nan"
    assert version.description.startswith("Promoted: 4.2 against 4.9.\n\n| figure | value |")
    assert "| nll.base | 4.9 |" in version.description
    assert version.source.endswith(f"/store/prefixes/{given.digest}.safetensors")
    [run] = runs_of(mlflow_registry, pack)
    assert version.run_id == run.info.run_id
    assert run.data.params == {"method": "prefix"}
    assert run.data.metrics == {"tokens_per_second": 231.5}


@pytest.mark.parametrize(
    "uri",
    ["s3://bucket/a b/é.safetensors", "/store/with space/x.safetensors", "store/x", "gs://b/x"],
)
def test_a_prefix_files_uri_comes_back_as_it_was_given(mlflow_registry: Any, uri: str) -> None:
    user = new_user()
    [version] = mlflow_registry.register(new_pack(), [entry(user, uri=uri, promote=True)])
    assert version.uri == uri
    assert mlflow_registry.champion(user).uri == uri


def test_a_uri_too_long_for_the_schema_is_refused_before_anything_is_written(
    mlflow_registry: Any,
) -> None:
    users, pack = [new_user(), new_user()], new_pack()
    long = entry(users[1], uri="s3://bucket/" + "x" * 500)
    with pytest.raises(RegistryError, match="too long"):
        mlflow_registry.register(pack, [entry(users[0]), long])
    assert mlflow_registry.current(users) == {}


def test_an_alias_on_a_version_that_is_not_ours_is_an_error_not_none(mlflow_registry: Any) -> None:
    user = new_user()
    models = mlflow_registry._models
    models.create_registered_model(f"ptuning-{user}")
    assert mlflow_registry.champion(user) is None
    assert mlflow_registry.current([user]) == {}
    models.create_model_version(f"ptuning-{user}", "s3://elsewhere/x", await_creation_for=0)
    models.set_registered_model_alias(f"ptuning-{user}", "champion", "1")
    with pytest.raises(RegistryError, match="did not register"):
        mlflow_registry.champion(user)
    with pytest.raises(RegistryError, match="did not register"):
        mlflow_registry.current([user])


def test_current_reads_champions_that_are_several_versions_old(mlflow_registry: Any) -> None:
    users = [new_user() for _ in range(4)]
    expected = {}
    for index, user in enumerate(users):
        entries = [entry(user, f"{n}", promote=n == index) for n in range(4)]
        versions = mlflow_registry.register(new_pack(), entries)
        expected[user] = Current(candidate=versions[3], champion=versions[index])
    mlflow_registry._names_per_query = 3  # more than one query
    assert mlflow_registry.current(users) == expected


def test_a_pickled_registry_opens_the_same_one(mlflow_registry: Any) -> None:
    user = new_user()
    [version] = mlflow_registry.register(new_pack(), [entry(user, promote=True)])
    assert pickle.loads(pickle.dumps(mlflow_registry)).champion(user) == version


@pytest.mark.slow
def test_processes_that_open_a_fresh_database_at_once_all_succeed(tmp_path: Path) -> None:
    database = tmp_path / "deep" / "mlflow.db"
    database.parent.mkdir()
    database.with_name("mlflow.db.new").write_bytes(b"left by a killed process")
    code = (
        "import sys\n"
        "from ptuning.registry import PackRecord, Registration, RegistryConfig, open_registry\n"
        "from ptuning.types import user_key\n"
        "registry = open_registry(RegistryConfig(uri=sys.argv[1]), '')\n"
        "key = user_key(sys.argv[2])\n"
        "registry.register(PackRecord(run_id='r', pack_id=sys.argv[2]), [Registration(\n"
        "    user_key=key, prefix_name='default', digest=sys.argv[2], uri='s3://b/x',\n"
        "    training_digest='t', data_digest='d', promote=True)])\n"
    )
    uri = f"sqlite:///{database}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, uri, f"user-{n}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(3)
    ]
    outputs = [process.communicate(timeout=180)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    assert outputs == ["", "", ""]  # no logs of migrations, no warnings
    registry = open_registry(RegistryConfig(uri=uri), "")
    for n in range(3):
        champion = registry.champion(user_key(f"user-{n}"))
        assert champion is not None
        assert champion.digest == f"user-{n}"


# Registries that cannot be asked.


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


def assert_every_call_raises(registry: Registry, uri: str, seconds: float) -> None:
    user = new_user()
    for call in (
        lambda: registry.champion(user),
        lambda: registry.current([user]),
        lambda: registry.register(new_pack(), [entry(user)]),
    ):
        began = time.monotonic()
        with pytest.raises(RegistryError) as caught:
            call()
        assert time.monotonic() - began < seconds
        assert uri in str(caught.value)


def test_a_server_that_is_down_raises_soon_and_never_reads_as_none() -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    assert_every_call_raises(open_registry(RegistryConfig(uri=uri), ""), uri, seconds=20)


def test_a_server_that_never_answers_raises_after_its_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with http_server(200, b"{}", wait=threading.Event()) as uri:
        assert_every_call_raises(open_registry(RegistryConfig(uri=uri), ""), uri, seconds=10)


@pytest.mark.parametrize("body", [b"<html>Not Found</html>", b'{"detail": "Not Found"}', b"[]"])
def test_a_404_of_something_that_is_not_mlflow_never_reads_as_none(body: bytes) -> None:
    with http_server(404, body) as uri:
        assert_every_call_raises(open_registry(RegistryConfig(uri=uri), ""), uri, seconds=20)


def test_an_unreachable_fake_raises_too() -> None:
    registry = MemoryRegistry()
    registry.unreachable = True
    assert_every_call_raises(registry, "", seconds=1)


def test_a_database_that_is_down_raises_soon_and_keeps_its_password() -> None:
    pytest.importorskip("psycopg2")
    uri = f"postgresql://tuner:hush-hush@127.0.0.1:{free_port()}/mlflow"
    began = time.monotonic()
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1") as caught:
        open_registry(RegistryConfig(uri=uri), "")
    assert time.monotonic() - began < 20
    assert "hush-hush" not in str(caught.value) + repr(caught.value.fields)


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("a note, not a database, and long enough to be read as one" * 20)
    with pytest.raises(RegistryError, match=r"mlflow\.db"):
        open_registry(RegistryConfig(uri=f"sqlite:///{path}"), "")
    assert path.read_text().startswith("a note")


# Opening.


def test_importing_the_package_does_not_import_mlflow() -> None:
    code = "import sys, ptuning.registry; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("uri", ["ftp://host/x", "databricks", "/data/mlflow.db", "sqlite3:///x"])
def test_an_unknown_scheme_is_a_configuration_error(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"registry\.uri"):
        open_registry(RegistryConfig(uri=uri), "memory://")


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_without_a_file_is_a_configuration_error(uri: str) -> None:
    with pytest.raises(ConfigError, match="plain file"):
        open_registry(RegistryConfig(uri=uri), "memory://")


def test_the_default_uri_is_used_where_none_is_configured() -> None:
    assert isinstance(open_registry(RegistryConfig(), "memory://"), MemoryRegistry)


def test_a_named_memory_registry_is_one_per_process_and_an_unnamed_one_is_new() -> None:
    named, other, unnamed = (RegistryConfig(uri=f"memory://{n}") for n in ("a", "b", ""))
    assert open_registry(named, "") is open_registry(named, "")
    assert open_registry(named, "") is not open_registry(other, "")
    assert open_registry(unnamed, "") is not open_registry(unnamed, "")


@pytest.mark.parametrize("name", HOSTILE_PREFIXES)
def test_a_hostile_prefix_name_is_refused_in_the_configuration(name: str) -> None:
    with pytest.raises(ValidationError):
        RegistryConfig(prefix_name=name)
