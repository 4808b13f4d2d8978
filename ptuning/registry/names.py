"""Every name that the registry writes: models, sources, tags. Pure functions.

Names end up in filters, paths and user interfaces, so each part is checked against its pattern
before use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from ptuning.errors import RegistryError
from ptuning.store_identity import NAMESPACE_PATTERN

Alias = Literal["candidate", "champion"]
PREFIX_NAME_PATTERN = "[a-z0-9_-]{1,64}"
USER_KEY_PATTERN = "[a-z2-7]{52}"
DIGEST_PATTERN = "[0-9a-f]{64}"
FINGERPRINT_PATTERN = "[0-9a-f]{64}"
MAX_NAME = 200  # characters; MLflow's column has 256 and is not checked before the database
SCHEME = "ptuning"

# Tags of a version. The prefix's identity:
DIGEST = "digest"
FINGERPRINT = "fingerprint"
TEMPLATE_DIGEST = "template_digest"
TRAINING_DIGEST = "training_digest"
DATA_DIGEST = "data_digest"
USER_KEY = "user_key"
PREFIX_NAME = "prefix_name"
# The decision of the run that judged it last:
DECISION = "decision"
REASON = "reason"
GATE_DIGEST = "gate_digest"
RUN_ID = "run_id"
PACK_ID = "pack_id"
PLANNED_AT = "planned_at"
FIGURE = "metric."  # and the metric's name
# The lineage of that decision: keys that `Registration.tags` may have.
LINEAGE = frozenset(
    {
        "backbone",
        "config_digest",
        "continued_from",
        "method",
        "partition_id",
        "resets",
        "start_ignored",
        "started_from",
    }
)
# Tags of one pack's MLflow run.
RUN_PACK_KEY = "ptuning.pack_key"
RUN_NAMESPACE = "ptuning.namespace"
RUN_RUN_ID = "ptuning.run_id"
RUN_PACK_ID = "ptuning.pack_id"
# Tag of the model that records the owner of a namespace.
OWNER = "ptuning.store_id"

_SOURCE = re.compile(f"{SCHEME}:/({USER_KEY_PATTERN})/({DIGEST_PATTERN})")


@dataclass(frozen=True)
class Scope:
    """The scope of a registry's names: one store and one backbone.

    `store_id` is the store's (`ptuning.store_identity`) and `fingerprint` the backbone's; names
    have its first 8 digits. Raises RegistryError for values that do not match their pattern.
    """

    namespace: str
    fingerprint: str
    store_id: str

    def __post_init__(self) -> None:
        _check("namespace", self.namespace, NAMESPACE_PATTERN, "use a-z, 0-9 and -")
        _check(
            "backbone's fingerprint",
            self.fingerprint,
            FINGERPRINT_PATTERN,
            "pass Backbone.fingerprint",
        )
        _check("store id", self.store_id, ".+", "pass the store_id of the store's identity")

    @property
    def owner_model(self) -> str:
        """The registered model whose tag `ptuning.store_id` records the namespace's owner."""
        return f"{self.namespace}.store"

    def model_name(self, user_key: str, prefix_name: str) -> str:
        """`<namespace>.<fingerprint, 8>.<user_key>`, and `.<prefix_name>` if not `default`.

        No part contains a dot, so different (namespace, backbone, user, prefix name) never share a
        name. The result is safe in a filter and at most 200 characters long.

        >>> Scope("prod", "8f3a" * 16, "id").model_name("a" * 52, "mail")[:14]
        'prod.8f3a8f3a.'
        """
        check_names(user_key, prefix_name)
        suffix = "" if prefix_name == "default" else f".{prefix_name}"
        name = f"{self.prefix}{user_key}{suffix}"
        _check("registered model's name", name, f".{{1,{MAX_NAME}}}", "use a shorter prefix_name")
        return name

    @property
    def prefix(self) -> str:
        """The common prefix of all names in this scope."""
        return f"{self.namespace}.{self.fingerprint[:8]}."

    def key_of(self, name: str, prefix_name: str) -> str | None:
        """The user key in a registered model's name, or None if the name has another scope or
        prefix name."""
        key = name.removeprefix(self.prefix).split(".")[0]
        if not matches(USER_KEY_PATTERN, key) or self.model_name(key, prefix_name) != name:
            return None
        return key


def source_of(user_key: str, digest: str) -> str:
    """A version's source, which identifies a prefix file but not its location; `prefix_of` is the
    inverse."""
    check_names(user_key, "default")
    check_digest(digest)
    return f"{SCHEME}:/{user_key}/{digest}"


def prefix_of(source: str) -> tuple[str, str]:
    """The (user_key, digest) in a version's source. Raises RegistryError for any other text."""
    found = _SOURCE.fullmatch(source)
    if found is None:
        raise RegistryError(
            "not the source of a prefix",
            seen=repr(source),
            expected=f"{SCHEME}:/<user_key>/<digest>",
            fix="point the alias at a version that a run registered",
        )
    return found[1], found[2]


def sqlite_uri(path: str) -> str:
    """The `sqlite:///` URI of a file, with `%` and `?` escaped.

    >>> sqlite_uri("/data/50% off?/mlflow.db")
    'sqlite:////data/50%25 off%3F/mlflow.db'
    """
    return "sqlite:///" + path.replace("%", "%25").replace("?", "%3F")


def check_names(user_key: str, prefix_name: str) -> None:
    """Raise RegistryError for invalid names, which would end up in filters and model names."""
    _check("user key", user_key, USER_KEY_PATTERN, "pass StoreIdentity.user_key(id), not the id")
    _check(
        "prefix name",
        prefix_name,
        PREFIX_NAME_PATTERN,
        "use lower-case letters, digits, - and _, at most 64 characters",
    )


def check_digest(digest: str) -> None:
    """Raise RegistryError for an invalid digest, which would become part of a file's path."""
    _check("digest", digest, DIGEST_PATTERN, "pass the SHA-256 of the prefix file, in hexadecimal")


def check_alias(alias: str) -> None:
    """Raise RegistryError for aliases other than `candidate` and `champion`."""
    if alias not in get_args(Alias):
        raise RegistryError("unknown alias", seen=repr(alias), expected=get_args(Alias))


def matches(pattern: str, value: str) -> bool:
    """Whether `value` as a whole matches the pattern."""
    return re.fullmatch(pattern, value) is not None


def _check(what: str, value: str, pattern: str, fix: str) -> None:
    if not matches(pattern, value):
        raise RegistryError(f"not a {what}", seen=repr(value), expected=pattern, fix=fix)
