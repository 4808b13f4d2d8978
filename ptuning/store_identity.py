"""A store's identity: the namespace of its registered names, and the salt of its users' keys.

`store.json` at the store's root is written once, by the first process that needs it, and never
changed:

    namespace   prefix of every name that the store registers, so that two products with a user
                "42" can share one MLflow; the registry refuses it to any other store
    salt        key of the HMAC that turns a user's id into a `user_key`
    store_id    random and public; the registry keeps it as the owner of the namespace

**The salt cannot be replaced.** It is the only link from a user's id to a key. If `store.json` is
lost, no file, alias or published champion can be found by user id, and no user can be forgotten.
Keep `store.json` in the store's backup, but away from people who can list MLflow: with it, anyone
can test guessed ids against the keys.

A copy of a store has the same identity, and the registry cannot tell the two apart, so let only
one of them register.

Several stores of one organisation can have the same keys if each is created with the same salt:
`PTUNING_STORE_SALT_FILE` names a file that contains it (such as a mounted secret), or
`PTUNING_STORE_SALT` is the salt, as hexadecimal text of at least 16 bytes (`openssl rand -hex 32`).
As a secret it has no setting and no flag: settings are written into every run's folder, and `ps`
shows flags.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ptuning.errors import ConfigError
from ptuning.store import Store
from ptuning.types import user_key

FILE = "store.json"
FORMAT = 1
NAMESPACE_PATTERN = "[a-z0-9-]{1,32}"
SALT_VARIABLE = "PTUNING_STORE_SALT"
SALT_FILE_VARIABLE = "PTUNING_STORE_SALT_FILE"

_SALT_BYTES = 32
_MIN_SALT_BYTES = 16
_STORE_ID = re.compile("[0-9a-f]{32}")
# If one of these exists, store.json must have existed before it.
_CONTENTS = ("inputs", "prefixes", "champions", "partitions", "runs", "mlflow.db")


@dataclass(frozen=True)
class StoreIdentity:
    """The contents of `store.json`. The salt is left out of `repr`, so that no log contains it.

    >>> StoreIdentity("dev", b"0123456789abcdef").user_key("alice")[:8]
    '7w7ywhfm'
    """

    namespace: str
    salt: bytes = field(repr=False)
    store_id: str = ""

    def user_key(self, user_id: str) -> str:
        """The user's key in this store: see `ptuning.types.user_key`."""
        return user_key(user_id, self.salt)


def read_identity(store: Store) -> StoreIdentity:
    """Read the store's identity. Raises ConfigError if there is none: a mistyped path must not
    create a new, empty store, which would serve everyone the base model."""
    identity = _read(store)
    if identity is None:
        _refuse_lost_identity(store)
        raise ConfigError(
            "no run has been made in this store",
            seen=store.root,
            expected=f"a store with a {FILE}",
            fix="check --store, or run `ptuning run` first",
        )
    return identity


def open_identity(
    store: Store, *, namespace: str | None = None, salt: bytes | None = None
) -> StoreIdentity:
    """Read the store's identity, or create it; processes that create it at the same time agree.

    `namespace` ([a-z0-9-], 1 to 32 characters) and `salt` (at least 16 bytes) are for a new store.
    By default the salt comes from the environment (see the module) or is random, and the namespace
    is random. If the store has an identity, given values must match it. Raises ConfigError if they
    do not, or if the store has lost its `store.json`.
    """
    salt = _salt_of_environment() if salt is None else salt
    _check_given(namespace, salt)
    identity = _read(store)
    if identity is None:
        _refuse_lost_identity(store)
        identity = _create(store, namespace, salt)
    _refuse_other_values(store, identity, namespace, salt)
    return identity


def _create(store: Store, namespace: str | None, salt: bytes | None) -> StoreIdentity:
    """Write a new identity unless another process is faster; returns the one that was written."""
    new = StoreIdentity(
        namespace or "s-" + base64.b32encode(secrets.token_bytes(7)).decode()[:10].lower(),
        salt or secrets.token_bytes(_SALT_BYTES),
        secrets.token_hex(16),
    )
    store.write_once(FILE, {**asdict(new), "salt": new.salt.hex(), "format": FORMAT})
    written = _read(store)
    assert written is not None  # it is never removed
    return written


def _read(store: Store) -> StoreIdentity | None:
    try:
        data = store.read(FILE)
    except FileNotFoundError:
        return None
    try:
        values = json.loads(data)
        identity = StoreIdentity(
            values["namespace"], bytes.fromhex(values["salt"]), values["store_id"]
        )
        valid = values["format"] == FORMAT and _is_valid(identity)
    except (ValueError, TypeError, KeyError):
        valid = False
    if not valid:
        raise ConfigError(
            f"{FILE} is not a valid store identity",
            seen=f"{store.path(FILE)}, {len(data)} bytes",
            expected=f"format {FORMAT} with a namespace, a salt and a store_id",
            fix="restore it from the store's backup; a newer format needs a newer ptuning",
        )
    return identity


def _is_valid(identity: StoreIdentity) -> bool:
    return (
        re.fullmatch(NAMESPACE_PATTERN, identity.namespace) is not None
        and len(identity.salt) >= _MIN_SALT_BYTES
        and _STORE_ID.fullmatch(identity.store_id) is not None
    )


def _refuse_lost_identity(store: Store) -> None:
    found = [name for name in _CONTENTS if store.exists(name)]
    # Checked again: another process may have created the store between the two checks.
    if found and not store.exists(FILE):
        raise ConfigError(
            "this store lost its identity: its users' keys cannot be computed without it",
            seen=f"{store.root} with {', '.join(found)} and no {FILE}",
            expected=f"the {FILE} that was written when the store was made",
            fix=f"restore {FILE} from the backup; without one, use a new, empty store",
        )


def _refuse_other_values(
    store: Store, identity: StoreIdentity, namespace: str | None, salt: bytes | None
) -> None:
    if namespace is not None and namespace != identity.namespace:
        raise ConfigError(
            "this store was made with another namespace",
            seen=f"registry.namespace={namespace}",
            expected=f"{identity.namespace}, as in {store.path(FILE)}",
            fix="omit registry.namespace, or use a new store",
        )
    if salt is not None and salt != identity.salt:
        raise ConfigError(
            "this store was made with another salt",
            seen=_print_of(salt),
            expected=f"{_print_of(identity.salt)}, as in {store.path(FILE)}",
            fix=f"unset {SALT_VARIABLE} and {SALT_FILE_VARIABLE}, or use a new store",
        )


def _print_of(salt: bytes) -> str:
    """A short hash: enough to tell two salts apart, but not to find one."""
    return f"a salt whose SHA-256 begins with {hashlib.sha256(salt).hexdigest()[:8]}"


def _check_given(namespace: str | None, salt: bytes | None) -> None:
    if namespace is not None and not re.fullmatch(NAMESPACE_PATTERN, namespace):
        raise ConfigError(
            "not a namespace",
            seen=repr(namespace),
            expected=NAMESPACE_PATTERN,
            fix="use lower-case letters, digits and -, at most 32 characters",
        )
    if salt is not None and len(salt) < _MIN_SALT_BYTES:
        raise ConfigError(
            "the salt is short enough to be guessed",
            seen=f"{len(salt)} bytes",
            expected=f"at least {_MIN_SALT_BYTES}",
            fix="make one with `openssl rand -hex 32`",
        )


def _salt_of_environment(environment: Any = os.environ) -> bytes | None:
    """The salt that the environment sets for a new store, or None."""
    file, text = environment.get(SALT_FILE_VARIABLE), environment.get(SALT_VARIABLE)
    if file and text:
        raise ConfigError(
            "the store's salt is set in two places",
            seen=f"{SALT_VARIABLE} and {SALT_FILE_VARIABLE}",
            fix="unset one of them",
        )
    if file:
        try:
            text = Path(file).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "the file with the store's salt cannot be read",
                seen=f"{SALT_FILE_VARIABLE}={file}: {type(error).__name__}",
                fix="name a readable file of hexadecimal text",
            ) from None
    elif not text:
        return None
    try:
        return bytes.fromhex(text.strip())
    except ValueError:
        raise ConfigError(
            "the store's salt is not hexadecimal text",
            seen=f"{len(text)} characters in {SALT_FILE_VARIABLE if file else SALT_VARIABLE}",
            fix="make one with `openssl rand -hex 32`",
        ) from None
