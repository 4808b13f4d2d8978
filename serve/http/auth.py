"""Authentication, and the users that a caller may name.

Without a keys file the body's `user` is trusted, and the service may listen on loopback only. With
one, a caller sends `Authorization: Bearer KEY` and may name the users listed for that key.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Mapping
from pathlib import Path

from ptuning.errors import ConfigError
from serve.config import ServeConfig
from serve.events import Refused

ANYONE = "*"


class Keys:
    """Callers' keys, stored as SHA-256, so that the time of a lookup reveals nothing about them."""

    def __init__(self, users_of: Mapping[str, frozenset[str] | None]) -> None:
        self._users_of = users_of  # digest of a key -> its users, None: any

    @classmethod
    def read(cls, path: str) -> Keys:
        """Read the JSON file `{"key": ["user", …] or "*", …}`. Raises ConfigError."""
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                "serve.api_keys_file cannot be read", seen=f"{type(error).__name__}: {error}"
            ) from error
        users_of: dict[str, frozenset[str] | None] = {}
        valid = isinstance(entries, dict) and bool(entries)
        for key, users in entries.items() if valid else ():
            is_list = isinstance(users, list) and all(isinstance(user, str) for user in users)
            if not key or not (is_list or users == ANYONE):
                valid = False
                break
            users_of[_digest(key)] = None if users == ANYONE else frozenset(users)
        if not valid:
            raise ConfigError(
                "serve.api_keys_file does not have the required form",
                expected='{"key": ["user", …] or "*", …}, with at least one key, none empty',
            )
        return cls(users_of)

    def check_caller(self, authorization: str | None) -> frozenset[str] | None:
        """The users that this caller may name; None: any. Raises Refused (401)."""
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        if scheme.lower() != "bearer" or digest not in self._users_of:
            raise Refused(
                "a valid key is needed: send it as `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
            )
        return self._users_of[digest]


def check_user(users: frozenset[str] | None, user: str | None) -> None:
    """Raise Refused (403) if the user is not one of `users`, which the caller may name (None:
    any)."""
    if users is not None and user is not None and user not in users:
        raise Refused(
            "this key may not ask as that user", status=403, code="forbidden", param="user"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(config: ServeConfig) -> None:
    """Raise ConfigError if strangers could name any user."""
    if config.api_keys_file is None and not is_loopback(config.host):
        raise ConfigError(
            "without credentials the service trusts the user in a request, so it listens on "
            "loopback only",
            seen=f"serve.host={config.host}",
            expected="127.0.0.1, ::1 or localhost",
            fix="set serve.api_keys_file, or leave serve.host at 127.0.0.1",
        )
    if config.api_keys_file is None and "*" in config.cors_origins:
        raise ConfigError(
            "without credentials any web page in a browser on this machine could ask as any user",
            seen="serve.cors_origins=*",
            expected="the origins of your pages, such as http://localhost:3000",
            fix="name the origins, or set serve.api_keys_file",
        )


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
