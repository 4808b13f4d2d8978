"""A store's identity: one namespace and one salt, whoever creates the store."""

from __future__ import annotations

import base64
import doctest
import hashlib
import hmac
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

import ptuning.store_identity
import ptuning.types
from ptuning.errors import ConfigError
from ptuning.store import Store
from ptuning.store_identity import (
    SALT_FILE_VARIABLE,
    SALT_VARIABLE,
    StoreIdentity,
    open_identity,
    read_identity,
)
from ptuning.types import user_key

SALT = bytes(range(32))


@pytest.fixture(autouse=True)
def no_salt_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (SALT_VARIABLE, SALT_FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_key_is_an_hmac_of_the_id_under_the_salt() -> None:
    digest = hmac.new(SALT, "Zoë".encode(), hashlib.sha256).digest()
    expected = base64.b32encode(digest).decode().lower().rstrip("=")
    assert user_key("Zoë", SALT) == StoreIdentity("dev", SALT).user_key("Zoë") == expected
    assert re.fullmatch("[a-z2-7]{52}", expected)
    assert user_key("Zoë") == user_key("Zoë", b"") != expected


def test_a_key_of_one_store_says_nothing_in_another(tmp_path: Path) -> None:
    first, second = (open_identity(Store(tmp_path / name)) for name in "ab")
    assert first.user_key("42") != second.user_key("42")
    assert first.namespace != second.namespace
    assert first.store_id != second.store_id


def test_examples_in_docstrings_are_true() -> None:
    for module in (ptuning.store_identity, ptuning.types):
        result = doctest.testmod(module)
        assert (result.attempted > 0, result.failed) == (True, 0)


def test_a_store_keeps_the_identity_that_it_was_made_with(store: Store) -> None:
    made = open_identity(store)
    assert re.fullmatch("s-[a-z2-7]{10}", made.namespace)
    assert len(made.salt) == 32
    assert open_identity(store) == read_identity(store) == made


def test_a_moved_store_has_the_same_keys(store: Store, tmp_path: Path) -> None:
    made = open_identity(store)
    Path(store.root).rename(tmp_path / "elsewhere")
    assert read_identity(Store(tmp_path / "elsewhere")) == made


def test_processes_that_make_a_store_at_once_agree(tmp_path: Path) -> None:
    for attempt in range(20):
        barrier = Barrier(8)

        def make_store(
            root: Path = tmp_path / str(attempt), barrier: Barrier = barrier
        ) -> StoreIdentity:
            barrier.wait()
            return open_identity(Store(root))

        with ThreadPoolExecutor(8) as pool:
            identities = [pool.submit(make_store) for _ in range(8)]
        assert len({identity.result() for identity in identities}) == 1


def test_namespace_and_salt_can_be_given_when_a_store_is_made(store: Store) -> None:
    made = open_identity(store, namespace="prod-eu", salt=SALT)
    assert (made.namespace, made.salt) == ("prod-eu", SALT)
    assert open_identity(store, namespace="prod-eu", salt=SALT) == made
    assert open_identity(store) == made


def test_a_later_different_namespace_or_salt_is_refused_and_changes_nothing(store: Store) -> None:
    made = open_identity(store, namespace="prod", salt=SALT)
    with pytest.raises(ConfigError, match=r"another namespace.*seen: .*dev.*expected: prod"):
        open_identity(store, namespace="dev")
    with pytest.raises(ConfigError, match="another salt") as caught:
        open_identity(store, salt=SALT[::-1])
    for salt in (SALT, SALT[::-1]):
        assert salt.hex()[:16] not in str(caught.value)
    assert read_identity(store) == made


def test_the_salt_comes_from_a_file_or_a_variable_and_never_stands_in_a_repr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "salt"
    file.write_text(SALT.hex() + "\n")
    monkeypatch.setenv(SALT_FILE_VARIABLE, str(file))
    first = open_identity(Store(tmp_path / "a"))
    monkeypatch.delenv(SALT_FILE_VARIABLE)
    monkeypatch.setenv(SALT_VARIABLE, SALT.hex())
    second = open_identity(Store(tmp_path / "b"))
    assert first.salt == second.salt == SALT
    assert first.user_key("42") == second.user_key("42")
    assert SALT.hex() not in repr(first)
    assert str(SALT) not in repr(first)
    monkeypatch.setenv(SALT_FILE_VARIABLE, str(file))
    with pytest.raises(ConfigError, match="two places"):
        open_identity(Store(tmp_path / "c"))


@pytest.mark.parametrize("text", ["", "  \n", "ab" * 15, "not hexadecimal", "é" * 64])
def test_a_file_without_a_good_salt_never_becomes_a_random_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    file = tmp_path / "salt"
    file.write_text(text)
    monkeypatch.setenv(SALT_FILE_VARIABLE, str(file))
    with pytest.raises(ConfigError, match="salt"):
        open_identity(Store(tmp_path / "store"))
    assert not (tmp_path / "store" / "store.json").exists()


@pytest.mark.parametrize("namespace", ["", "A", "a.b", "a/b", "a" * 33, "a\n", "é"])
def test_a_hostile_namespace_is_refused(store: Store, namespace: str) -> None:
    with pytest.raises(ConfigError, match="not a namespace"):
        open_identity(store, namespace=namespace)
    assert not store.exists("store.json")


def test_a_mistyped_store_is_refused_and_not_made(store: Store) -> None:
    with pytest.raises(ConfigError, match="no run has been made in this store"):
        read_identity(store)
    assert not Path(store.root).exists()


@pytest.mark.parametrize("content", ["prefixes/aa/x", "champions/x", "mlflow.db"])
def test_a_store_that_lost_its_identity_is_never_given_a_new_one(
    store: Store, content: str
) -> None:
    store.write(content, b"x")
    for opener in (open_identity, read_identity):
        with pytest.raises(ConfigError, match=r"lost its identity.*restore store\.json"):
            opener(store)
    assert not store.exists("store.json")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"namespace": "../other"},
        {"salt": "00"},
        {"salt": 5},
        {"store_id": None},
    ],
)
def test_an_identity_that_is_not_whole_is_refused(store: Store, change: dict[str, object]) -> None:
    open_identity(store)
    written = json.loads(store.read("store.json"))
    store.write("store.json", json.dumps({**written, **change}).encode())
    with pytest.raises(ConfigError, match="is not a valid store identity"):
        open_identity(store)
    store.write("store.json", b"[")
    with pytest.raises(ConfigError, match="is not a valid store identity"):
        read_identity(store)
