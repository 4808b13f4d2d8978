"""Whose a store is: the namespace of its names, and the salt of its users' keys.

`store.json` at the store's root is written once, by whoever comes first, and is never changed:

    namespace   stands in front of every name that the store registers, so that two products with
                a user "42" can share one MLflow; the registry refuses it to another store
    salt        the key of the HMAC that turns a user's id into a `user_key`
    store_id    random and public; the registry keeps it to know whose a namespace is

**The salt cannot be replaced.** Nothing else in a store leads from a user's id to a key: once
`store.json` is lost, no file, alias or published champion can be found again by its user's id,
and nobody can be forgotten by it. Keep `store.json` in the store's backup, and out of reach of
whoever may list MLflow: with it, anyone can test which keys are those of ids that they guess.

A copy of a store has its identity: the registry takes both for one, so let only one of them
register.

Several stores of one organisation can have the same keys by giving the same salt when each is
made: `PTUNING_STORE_SALT_FILE` names a file with it (a mounted secret, say), or
`PTUNING_STORE_SALT` holds it, as hexadecimal text of at least 16 bytes (`openssl rand -hex 32`).
It is a secret, so there is no setting and no flag for it: settings are written into every run's
folder and flags are shown by `ps`.
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
# Whatever of these is there was written after store.json.
_CONTENTS = ("prefixes", "champions", "inputs", "partitions", "runs", "mlflow.db")


@dataclass(frozen=True)
class StoreIdentity:
    """What `store.json` says. The salt is left out of `repr`, so that no log has it.

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
    """The store's identity. Raises ConfigError where there is none: a mistyped store must not
    become a new, empty one that answers everybody with the base model."""
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
    """The store's identity, made here if it has none; processes that make it at once agree.

    `namespace` ([a-z0-9-], 1 to 32 characters) and `salt` (at least 16 bytes) are what a new
    store gets: random where they are not given, the salt from the environment first (see the
    module). For a store that has an identity they must be what it has. Raises ConfigError where
    they are not, and where the store lost its `store.json`.
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
    """Write a new identity unless another process is faster; whose stands is returned."""
    new = StoreIdentity(
        namespace or "s-" + base64.b32encode(secrets.token_bytes(7)).decode()[:10].lower(),
        salt or secrets.token_bytes(_SALT_BYTES),
        secrets.token_hex(16),
    )
    store.write_once(FILE, {**asdict(new), "salt": new.salt.hex(), "format": FORMAT})
    written = _read(store)
    assert written is not None  # nobody removes it
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
            f"{FILE} does not say whose this store is",
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
    # Asked again: another process may have made the store between the two looks.
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
            fix="leave registry.namespace out, or use a new store",
        )
    if salt is not None and salt != identity.salt:
        raise ConfigError(
            "this store was made with another salt",
            seen=_print_of(salt),
            expected=f"{_print_of(identity.salt)}, as in {store.path(FILE)}",
            fix=f"unset {SALT_VARIABLE} and {SALT_FILE_VARIABLE}, or use a new store",
        )


def _print_of(salt: bytes) -> str:
    """Enough to tell two salts apart, too little to find one."""
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
            "the salt is too short to keep anybody from guessing it",
            seen=f"{len(salt)} bytes",
            expected=f"at least {_MIN_SALT_BYTES}",
            fix="make one with `openssl rand -hex 32`",
        )


def _salt_of_environment(environment: Any = os.environ) -> bytes | None:
    """The salt that the environment gives for a new store, None where it gives none."""
    file, text = environment.get(SALT_FILE_VARIABLE), environment.get(SALT_VARIABLE)
    if file and text:
        raise ConfigError(
            "two places give the store's salt",
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
