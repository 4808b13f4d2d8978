"""The registry's contract, for the fake, SQLite, PostgreSQL and a real MLflow server."""

from __future__ import annotations

import doctest
import pickle
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from registry_backends import (
    FINGERPRINT,
    OTHER_FINGERPRINT,
    SCOPE,
    Open,
    decision_of,
    digest_of,
    entry,
    new_pack,
    new_user,
    open_at,
    promoted,
    runs_of,
    versions_of,
)

import ptuning.registry.names
from ptuning.errors import ConfigError, RegistryError
from ptuning.registry import (
    Current,
    MemoryRegistry,
    PackRecord,
    Registry,
    RegistryConfig,
    Scope,
    Version,
    open_registry,
    registry_uri,
)
from ptuning.registry.names import prefix_of, source_of
from ptuning.store import Store


def new_scope() -> Scope:
    """The scope of a new store, with the suite's backbone."""
    return Scope(f"ns-{uuid.uuid4().hex[:20]}", FINGERPRINT, f"store-{uuid.uuid4().hex}")


# What every registry must do.


def test_every_backend_is_a_registry(registry: Registry) -> None:
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
    given = promoted(user)
    [version] = registry.register(new_pack(), [given])
    assert registry.champion(user) == version
    assert registry.current([user]) == {user: Current(candidate=version, champion=version)}
    assert version.version == "1"
    for name in ("user_key", "prefix_name", "digest", "training_digest", "data_digest", "decision"):
        assert getattr(version, name) == getattr(given, name)


def test_a_rejected_retraining_leaves_the_champion_where_it_was(registry: Registry) -> None:
    user = new_user()
    [old] = registry.register(new_pack(), [promoted(user, "old")])
    [new] = registry.register(new_pack(), [entry(user, "new")])
    assert registry.champion(user) == old
    assert registry.current([user]) == {user: Current(candidate=new, champion=old)}


def test_registering_a_pack_again_adds_no_version_and_no_run(registry: Registry) -> None:
    users, pack = [new_user(), new_user()], new_pack(params={"epochs": "3"}, metrics={"s": 1.5})
    entries = [promoted(user) for user in users]
    first = registry.register(pack, entries)
    assert registry.register(pack, entries) == first
    assert registry.register(replace(pack, metrics={"s": 2.5}), entries) == first
    assert len(runs_of(registry, pack)) == 1
    assert all(len(versions_of(registry, user)) == 1 for user in users)


def test_a_digest_seen_before_moves_the_aliases_back_without_a_new_version(
    registry: Registry,
) -> None:
    user = new_user()
    [old] = registry.register(new_pack(), [promoted(user, "old")])
    registry.register(new_pack(), [promoted(user, "new")])
    [again] = registry.register(new_pack(), [promoted(user, "old")])
    assert (again.version, again.digest) == (old.version, old.digest)
    assert registry.champion(user) == again
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
    entries = [
        promoted(user) if index % 2 == 0 else entry(user) for index, user in enumerate(users)
    ]
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
            promoted(user, "plain"),
            promoted(user, "mail", prefix_name="mail"),
            entry(user, "code", prefix_name="mail-code_2"),
        ],
    )
    registry.register(new_pack(), [promoted(other, "mail", prefix_name="mail")])
    assert registry.champion(user) == plain
    assert registry.champion(user, "mail") == mail
    assert registry.champion(user, "mail-code_2") is None
    assert registry.current([user, other], "mail-code_2") == {user: Current(candidate=code)}
    assert registry.current([user, other]) == {user: Current(candidate=plain, champion=plain)}


def test_set_alias_promotes_and_rolls_back(registry: Registry) -> None:
    user = new_user()
    [old] = registry.register(new_pack(), [promoted(user, "old")])
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
HOSTILE_PREFIXES = ["", "A", "a.b", "a/b", "a:b", "a'b", "a b", "a\n", "x" * 65, "*"]


@pytest.mark.parametrize(
    ("user", "prefix"),
    [(user, "default") for user in HOSTILE_USERS] + [("a" * 52, p) for p in HOSTILE_PREFIXES],
)
@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_hostile_names_are_refused_everywhere_and_nothing_is_written(
    kind: str, user: str, prefix: str, request: pytest.FixtureRequest
) -> None:
    registry = open_at("memory://" if kind == "memory" else request.getfixturevalue("sqlite_uri"))
    good = new_user()
    version = Version(
        user_key=user,
        prefix_name=prefix,
        version="1",
        digest="",
        training_digest="",
        data_digest="",
    )
    calls: list[Callable[[], Any]] = [
        lambda: registry.champion(user, prefix),
        lambda: registry.current([good, user], prefix),
        lambda: registry.register(new_pack(), [entry(good), entry(user, prefix_name=prefix)]),
        lambda: registry.set_alias(version, "champion"),
    ]
    for call in calls:
        with pytest.raises(RegistryError, match=r"not a (user key|prefix name)"):
            call()
    assert registry.current([good]) == {}


@pytest.mark.parametrize(
    "digest", ["", "x" * 64, "a" * 63, "../" * 21 + "a", "A" * 64, "a" * 64 + "\n"]
)
def test_a_digest_that_could_be_a_path_is_refused_and_nothing_is_written(
    registry: Registry, digest: str
) -> None:
    good, user = new_user(), new_user()
    with pytest.raises(RegistryError, match="not a digest"):
        registry.register(new_pack(), [entry(good), entry(user, digest=digest)])
    assert registry.current([good, user]) == {}


def test_a_tag_that_nobody_declared_is_refused_and_nothing_is_written(registry: Registry) -> None:
    user = new_user()
    with pytest.raises(RegistryError, match=r"unknown tags.*seen: uri"):
        registry.register(new_pack(), [entry(user, tags={"uri": "http://169.254.169.254/"})])
    assert registry.current([user]) == {}


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


# Owners of names.


def test_two_stores_on_one_registry_never_see_each_others_users(open_scope: Open) -> None:
    ours, theirs = open_scope(new_scope()), open_scope(new_scope())
    user, pack = new_user(), new_pack()
    [our_version] = ours.register(pack, [promoted(user, "ours")])
    assert theirs.champion(user) is None
    assert theirs.current([user]) == {}
    with pytest.raises(RegistryError):
        theirs.set_alias(our_version, "champion")
    [their_version] = theirs.register(pack, [promoted(user, "theirs")])
    assert (our_version.version, their_version.version) == ("1", "1")
    assert ours.champion(user) == our_version
    assert theirs.champion(user) == their_version
    assert ours.current([user])[user].candidate == our_version
    assert len(versions_of(theirs, user)) == 1


def test_a_namespace_of_another_store_is_refused_before_anything_is_written(
    open_scope: Open,
) -> None:
    scope = new_scope()
    ours, theirs = open_scope(scope), open_scope(replace(scope, store_id="another"))
    user, pack = new_user(), new_pack()
    [version] = ours.register(new_pack(), [promoted(user)])
    for call in (
        lambda: theirs.register(pack, [promoted(user, "theirs")]),
        lambda: theirs.champion(user),
        lambda: theirs.current([user]),
        lambda: theirs.set_alias(version, "candidate"),
    ):
        with pytest.raises(RegistryError, match="belongs to another store") as caught:
            call()
        assert scope.store_id in str(caught.value)
    assert runs_of(ours, pack) == []
    assert len(versions_of(ours, user)) == 1
    assert ours.champion(user) == version


def test_of_two_stores_that_claim_a_namespace_at_once_one_gets_it(open_scope: Open) -> None:
    for _ in range(3):
        scope, user = new_scope(), new_user()
        stores = [open_scope(replace(scope, store_id=f"store-{n}")) for n in range(4)]
        barrier = threading.Barrier(len(stores))

        def claim(store: Registry, barrier: Any = barrier, user: str = user) -> str | None:
            barrier.wait(30)
            try:
                store.register(new_pack(), [promoted(user, store.scope.store_id)])
            except RegistryError as error:
                assert "belongs to another store" in str(error)  # noqa: PT017
                return None
            return store.scope.store_id

        with ThreadPoolExecutor(len(stores)) as pool:
            [winner] = [one for one in pool.map(claim, stores) if one is not None]
        reader = open_scope(replace(scope, store_id=winner))
        assert reader.champion(user).digest == digest_of(user, winner)


def test_the_service_of_one_backbone_never_sees_anothers_champion(open_scope: Open) -> None:
    scope = new_scope()
    old, new = open_scope(scope), open_scope(replace(scope, fingerprint=OTHER_FINGERPRINT))
    user = new_user()
    [first] = old.register(new_pack(planned_at=1), [promoted(user, "old")])
    assert new.champion(user) is None
    [second] = new.register(new_pack(planned_at=2), [promoted(user, "new")])
    assert old.champion(user) == first
    assert new.champion(user) == second


# A version that is judged again.

MILD: dict[str, Any] = {
    "gate_digest": "mild",
    "reason": "0.4 better than base",
    "metrics": {"nll_base_valid": 4.9},
}
STRICT: dict[str, Any] = {"gate_digest": "strict", "reason": "needed more than 99"}


def test_a_version_judged_again_shows_its_new_decision(registry: Registry) -> None:
    user, monday, tuesday = new_user(), new_pack(planned_at=1), new_pack(planned_at=2)
    old = {"nll_base_valid": 5.1, "nll_other_valid": 4.5}
    registry.register(monday, [entry(user, **STRICT, metrics=old, tags={"method": "prefix"})])
    registry.register(tuesday, [promoted(user, **MILD, tags={"backbone": "smollm2"})])
    assert decision_of(registry, user, "first") == {
        "decision": "promoted",
        "reason": "0.4 better than base",
        "gate": "mild",
        "metric.nll_base_valid": "4.9",
        "backbone": "smollm2",
    }
    assert len(versions_of(registry, user)) == 1
    now = registry.current([user])[user]
    assert now.candidate == now.champion == registry.champion(user)
    assert now.champion is not None
    assert (now.champion.gate_digest, now.champion.decision) == ("mild", "promoted")
    assert now.champion.planned_at == 2


def test_a_version_that_no_longer_passes_says_so_and_keeps_serving(registry: Registry) -> None:
    user = new_user()
    registry.register(new_pack(planned_at=1), [promoted(user, **MILD)])
    [version] = registry.register(new_pack(planned_at=2), [entry(user, **STRICT)])
    assert (
        registry.champion(user) == version
    )  # the gate decides who is promoted, not who stays champion
    assert (version.decision, version.gate_digest) == ("rejected", "strict")


def test_an_older_run_that_is_resumed_moves_nothing_back(registry: Registry) -> None:
    user = new_user()
    older, newer = new_pack(planned_at=1), new_pack(planned_at=2)
    [new] = registry.register(newer, [promoted(user, "new")])
    [old] = registry.register(older, [promoted(user, "old", **MILD)])
    assert old.decision == "pending"
    assert "newer run" in decision_of(registry, user, "old")["reason"]
    assert registry.current([user]) == {user: Current(candidate=new, champion=new)}
    registry.register(older, [entry(user, "rejected")])
    assert registry.current([user]) == {user: Current(candidate=new, champion=new)}


def test_an_older_run_does_not_judge_again_what_a_newer_one_judged(registry: Registry) -> None:
    user = new_user()
    older, newer = new_pack(planned_at=1), new_pack(planned_at=2)
    [before] = registry.register(older, [promoted(user, "before")])
    [judged] = registry.register(newer, [entry(user, **STRICT)])
    assert registry.register(older, [promoted(user, **MILD)]) == [judged]
    assert registry.current([user]) == {user: Current(candidate=judged, champion=before)}
    assert decision_of(registry, user, "first")["gate"] == "strict"


def test_a_pending_prefix_moves_no_alias(registry: Registry) -> None:
    user = new_user()
    [old] = registry.register(new_pack(), [promoted(user, "old")])
    [held] = registry.register(new_pack(), [entry(user, "new", decision="pending")])
    assert held.decision == "pending"
    assert registry.current([user]) == {user: Current(candidate=old, champion=old)}
    [approved] = registry.register(new_pack(planned_at=1), [promoted(user, "new")])
    assert registry.current([user]) == {user: Current(candidate=approved, champion=approved)}


# Opening.


def test_importing_the_package_does_not_import_mlflow() -> None:
    code = "import sys, ptuning.registry; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("uri", ["ftp://host/x", "databricks", "/data/mlflow.db", "sqlite3:///x"])
def test_an_unknown_scheme_is_a_configuration_error(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"registry\.uri"):
        open_at(uri)


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_without_a_file_is_a_configuration_error(uri: str) -> None:
    with pytest.raises(ConfigError, match="plain file"):
        open_at(uri)


def test_the_default_uri_is_used_where_none_is_configured() -> None:
    opened = open_registry(
        RegistryConfig(), "memory://", namespace="n", fingerprint=FINGERPRINT, store_id="s"
    )
    assert isinstance(opened, MemoryRegistry)
    assert opened.scope == Scope("n", FINGERPRINT, "s")


def test_a_named_memory_registry_is_one_per_process_and_an_unnamed_one_is_new() -> None:
    user, name = new_user(), f"memory://{uuid.uuid4().hex}"
    [version] = open_at(name).register(new_pack(), [promoted(user)])
    assert open_at(name).champion(user) == version
    assert open_at(f"{name}-other").champion(user) is None
    open_at("memory://").register(new_pack(), [promoted(user)])
    assert open_at("memory://").champion(user) is None


def test_the_embedded_registry_lies_in_the_store_whatever_the_store_is_called(
    tmp_path: Path,
) -> None:
    store, user = Store(tmp_path / "50%25 off? ü#;'"), new_user()
    uri = registry_uri(RegistryConfig(), store)
    open_at(uri).register(new_pack(), [promoted(user)])
    assert list(tmp_path.rglob("mlflow.db")) == [Path(store.path("mlflow.db"))]
    assert open_at(uri).champion(user) is not None


@pytest.mark.parametrize(
    "scope",
    [
        ("a.b", FINGERPRINT, "s"),
        ("", FINGERPRINT, "s"),
        ("a" * 33, FINGERPRINT, "s"),
        ("a", FINGERPRINT[:8], "s"),
        ("a", "'" + FINGERPRINT[1:], "s"),
        ("a", FINGERPRINT, ""),
    ],
)
def test_a_scope_that_is_none_is_refused(scope: tuple[str, str, str]) -> None:
    with pytest.raises(RegistryError, match=r"not a (namespace|backbone's fingerprint|store id)"):
        Scope(*scope)


def test_names_tell_their_owner_and_never_collide() -> None:
    user = new_user()
    assert SCOPE.model_name(user, "default") == f"contract.{FINGERPRINT[:8]}.{user}"
    assert SCOPE.model_name(user, "mail") == f"contract.{FINGERPRINT[:8]}.{user}.mail"
    assert len(Scope("n" * 32, FINGERPRINT, "s").model_name(user, "p" * 64)) <= 200
    # A namespace may look like part of another's names. Dots separate them, so no two are equal.
    names = {
        Scope(namespace, fingerprint, "s").model_name(user, prefix)
        for namespace in ("a", "a-b", "store", "default")
        for fingerprint in (FINGERPRINT, OTHER_FINGERPRINT)
        for prefix in ("default", "store", "a", "-", "_")
    }
    assert len(names) == 4 * 2 * 5
    assert doctest.testmod(ptuning.registry.names) == (0, 2)  # failed, attempted
    assert not names & {Scope(n, FINGERPRINT, "s").owner_model for n in ("a", "a-b", "store")}


def test_a_source_is_a_key_and_a_digest_and_nothing_else() -> None:
    user, digest = new_user(), digest_of("a", "b")
    assert prefix_of(source_of(user, digest)) == (user, digest)
    for source in (
        f"ptuning:/{user}/../{digest}",
        f"ptuning://host/{user}/{digest}",
        f"file:///{user}/{digest}",
        f"ptuning:/{user}/{digest}/x",
        f"ptuning:/{user}/{digest}\n",
        "http://169.254.169.254/latest",
    ):
        with pytest.raises(RegistryError, match="not the source of a prefix"):
            prefix_of(source)


@pytest.mark.parametrize("name", HOSTILE_PREFIXES)
def test_a_hostile_prefix_name_is_refused_in_the_configuration(name: str) -> None:
    with pytest.raises(ConfigError):
        RegistryConfig(prefix_name=name)


@pytest.mark.parametrize("name", ["", "a.b", "A", "a" * 33, "a\n"])
def test_a_hostile_namespace_is_refused_in_the_configuration(name: str) -> None:
    with pytest.raises(ConfigError):
        RegistryConfig(namespace=name)
