"""The registry's protocol: what the run writes and the service reads, whatever stands behind it.

A user's prefixes are versions of one registered model per (user_key, prefix_name), with
two aliases: `candidate` (newest) and `champion` (served).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args, runtime_checkable

from pydantic import Field

from ptuning.errors import RegistryError
from ptuning.types import Config

Alias = Literal["candidate", "champion"]
PREFIX_NAME_PATTERN = "[a-z0-9][a-z0-9_-]{0,63}"
_USER_KEY = re.compile("[a-z2-7]{52}")
_PREFIX_NAME = re.compile(PREFIX_NAME_PATTERN)


class RegistryConfig(Config):
    uri: str | None = Field(
        None,
        description="MLflow tracking and registry URI (http://…, postgresql://…, sqlite:///…); "
        "none: the store's embedded mlflow.db",
    )
    experiment: str = Field("ptuning", description="MLflow experiment that holds one run per pack")
    prefix_name: str = Field(
        "default",
        pattern=f"^{PREFIX_NAME_PATTERN}$",
        description="which of a user's named prefixes this run trains",
    )


@dataclass(frozen=True, kw_only=True)
class Registration:
    """One candidate to register. `uri` is where its prefix file lies."""

    user_key: str
    prefix_name: str
    digest: str
    uri: str
    training_digest: str
    data_digest: str
    gate_digest: str = ""  # which gate judged it; empty: not judged to the end
    promote: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    description: str = ""


@dataclass(frozen=True, kw_only=True)
class Version:
    """One registered version. `version` is a string, as MLflow gives it."""

    user_key: str
    prefix_name: str
    version: str
    digest: str
    uri: str
    training_digest: str
    data_digest: str
    gate_digest: str = ""
    run_id: str = ""  # the run and pack that judged it last: where its losses are kept
    pack_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Current:
    """A user's two aliases now; either may be missing."""

    candidate: Version | None = None
    champion: Version | None = None


@dataclass(frozen=True, kw_only=True)
class PackRecord:
    """What one MLflow run of a pack holds: parameters and metrics shown in the UI."""

    run_id: str
    pack_id: str
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Registry(Protocol):
    def register(self, pack: PackRecord, entries: Sequence[Registration]) -> list[Version]:
        """Register each entry as a version, move `champion` to it if `promote`, then `candidate`:
        whoever is killed between the two leaves a user that is not taken for finished.

        Idempotent: an entry whose digest is already a version of its model makes no second
        version, and a pack registered twice makes no second MLflow run.
        """

    def champion(self, user_key: str, prefix_name: str = "default") -> Version | None:
        """The serving version, or None. Raises RegistryError if the registry can't be asked:
        'unreachable' must never read as 'has none'."""

    def current(self, user_keys: Iterable[str], prefix_name: str = "default") -> dict[str, Current]:
        """Both aliases of many users at once; users never registered are absent."""

    def set_alias(self, version: Version, alias: Alias) -> None:
        """Point one alias of the version's own model at it."""

    def remove_alias(self, user_key: str, prefix_name: str, alias: Alias) -> None:
        """Take an alias away; nothing happens where there is none."""

    def with_champion(self, prefix_name: str = "default") -> Iterator[str]:
        """Keys of all users who have a champion under that name."""


def check_names(user_key: str, prefix_name: str) -> None:
    """Refuse names that a registry must never see: they end up in filters and model names."""
    if not _USER_KEY.fullmatch(user_key):
        raise RegistryError(
            "not a user key",
            seen=repr(user_key),
            expected="52 characters of [a-z2-7]",
            fix="pass ptuning.types.user_key(user_id), not the id itself",
        )
    if not _PREFIX_NAME.fullmatch(prefix_name):
        raise RegistryError(
            "not a prefix name",
            seen=repr(prefix_name),
            expected=PREFIX_NAME_PATTERN,
            fix="use lower-case letters, digits, - and _, at most 64 characters",
        )


def check_alias(alias: str) -> None:
    """Refuse aliases other than `candidate` and `champion`."""
    if alias not in get_args(Alias):
        raise RegistryError("unknown alias", seen=repr(alias), expected=get_args(Alias))
