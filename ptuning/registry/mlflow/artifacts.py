"""The MLflow plugin that resolves `ptuning:/<user_key>/<digest>` to a prefix file in a store.

MLflow finds this class by the entry point `mlflow.artifact_repository`, wherever ptuning is
installed, and uses it for the sources of our versions, so that

    PTUNING_STORE=/mnt/store MLFLOW_TRACKING_URI=… python -c "
    import mlflow
    mlflow.artifacts.download_artifacts('models:/<registered model>@champion')"

fetches the prefix file wherever the store is mounted. The registry is not trusted: a source is a
user's key and a digest, never a path, and the file that is read must have that digest.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from mlflow.entities import FileInfo
from mlflow.store.artifact.artifact_repo import ArtifactRepository

from ptuning.errors import ArtifactError, ConfigError
from ptuning.registry.names import prefix_of
from ptuning.store import Store, prefix_path

STORE_VARIABLE = "PTUNING_STORE"


class PrefixArtifacts(ArtifactRepository):
    """A version's only artifact, `<digest>.safetensors`, read-only."""

    def __init__(
        self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
    ) -> None:
        super().__init__(artifact_uri, tracking_uri, registry_uri)
        self._user_key, self._digest = prefix_of(artifact_uri)

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        """The prefix file at the root."""
        if path:
            return []
        return [FileInfo(self._file, False, None)]  # its size would cost an access to the store

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        if remote_file_path != self._file:
            raise ArtifactError(
                "the version of a prefix has no such artifact",
                seen=remote_file_path,
                expected=self._file,
            )
        Path(local_path).write_bytes(self._read())

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        raise _read_only()

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        raise _read_only()

    @property
    def _file(self) -> str:
        return f"{self._digest}.safetensors"

    def _read(self) -> bytes:
        store = _store()
        name = prefix_path(self._user_key, self._digest)
        try:
            data = store.read(name)
        except FileNotFoundError:
            raise ArtifactError(
                "the store has no such prefix",
                seen=store.path(name),
                fix=f"set {STORE_VARIABLE} to the store of the run that trained it",
            ) from None
        digest = hashlib.sha256(data).hexdigest()
        if digest != self._digest:
            raise ArtifactError(
                "a prefix file does not have the digest in the registry",
                seen=f"{store.path(name)} with digest {digest}",
                expected=self._digest,
                fix="restore the file from the store's backup, or run again",
            )
        return data


def _store() -> Store:
    root = os.environ.get(STORE_VARIABLE)
    if not root:
        raise ConfigError(
            "the registry does not record the store's location, so it must be given",
            seen=f"{STORE_VARIABLE} is not set",
            fix=f"set {STORE_VARIABLE} to the store's directory or URI",
        )
    return Store(root)


def _read_only() -> Any:
    return ArtifactError(
        "a prefix is written by a run, not through MLflow", fix="use `ptuning run`"
    )
