"""Start a run: check the inputs first, then resume the unfinished run with the same data and
settings, or create a new one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipelines.config import RunConfig
from pipelines.gangs import cluster
from pipelines.gangs.cluster import NamedBackbone
from pipelines.rows.inputs import find_files
from pipelines.rows.stored import Partition
from pipelines.run_folder import Header, RunFolder, find_unfinished, lock_runs, new_run_id
from ptuning.errors import ConfigError, RunError
from ptuning.identity import Recipe
from ptuning.model.load import load_template, outline
from ptuning.registry import open_registry, registry_uri
from ptuning.registry.base import Registry
from ptuning.store import Store
from ptuning.store_identity import StoreIdentity
from ptuning.train.words import check_init_text


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's fixed values. In `config` the backbone's dtype and attention are resolved."""

    folder: RunFolder
    config: RunConfig
    part: Partition
    recipe: Recipe
    identity: StoreIdentity
    backbone: NamedBackbone
    config_digest: str
    resumed: bool

    @property
    def run_id(self) -> str:
        return self.folder.run_id

    @property
    def store(self) -> Store:
        return self.folder.store


def check_inputs(sources: Sequence[str], store: Store, config: RunConfig) -> None:
    """Check everything that can be checked before a cluster is started or a row is read. Raises
    DataError, ModelNotFound, ConfigError, MethodError or RunError."""
    find_files(sources)
    config.method.check(outline(config.backbone.name))
    if config.method.init_text is not None:
        check_init_text(load_template(config.backbone.name, config.data.template), config.method)
    registry_uri(config.registry, store)
    _check_writable(store)


def reach_registry(
    config: RunConfig, store: Store, identity: StoreIdentity, fingerprint: str
) -> Registry:
    """Open the registry and query it once, so that a wrong address, or a namespace that belongs to
    another store, is found before the partition."""
    registry = open_registry(
        config.registry,
        registry_uri(config.registry, store),
        namespace=identity.namespace,
        fingerprint=fingerprint,
        store_id=identity.store_id,
    )
    no_user = identity.user_key("")  # no user has an empty id
    registry.champion(no_user, config.registry.prefix_name)
    return registry


def check_places(store: str, sources: Sequence[str]) -> None:
    """Raise ConfigError for relative places in a job of `ray job submit`. They would lie in a copy
    of the working directory that Ray removes afterwards, and each job's copy has another path, so
    that its files would count as new ones."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    for option, place in (("--store", store), *(("--data", source) for source in sources)):
        if "://" not in place and not os.path.isabs(os.path.expanduser(place)):
            raise ConfigError(
                "a job's store and data need absolute paths",
                seen=f"{option} {place}",
                expected="a path that all nodes can see, or s3://bucket/prefix",
                fix="the job's working directory is a copy that is removed after the job",
            )


def _check_writable(store: Store) -> None:
    """Raise RunError if the store cannot be written, before hours of work rather than after."""
    try:
        store.write(".writable", b"")
        store.remove(".writable")
    except OSError as error:
        raise RunError(
            "the store cannot be written", seen=str(error), fix="set --store to a writable place"
        ) from error


@contextlib.contextmanager
def open_run(
    store: Store,
    config: RunConfig,
    part: Partition,
    identity: StoreIdentity,
    backbone: NamedBackbone,
) -> Iterator[Run]:
    """Open and lock the unfinished run with the same partition and configuration, or a new run."""
    header = {
        "partition_id": part.partition_id,
        # Of the configuration as requested: "auto" may be resolved differently next time.
        "config_digest": config.digest(),
        "fingerprint": backbone.fingerprint,
        "template_digest": backbone.template_digest,
    }
    resolved = cluster.resolve(config)
    with contextlib.ExitStack() as locks:
        folder, decided, resumed = _take(store, config, resolved, header, locks)
        yield Run(
            folder=folder,
            config=decided,
            part=part,
            recipe=_recipe(decided),
            identity=identity,
            backbone=backbone,
            config_digest=header["config_digest"],
            resumed=resumed,
        )


def _take(
    store: Store,
    config: RunConfig,
    resolved: RunConfig,
    header: Header,
    locks: contextlib.ExitStack,
) -> tuple[RunFolder, RunConfig, bool]:
    """Find the run and lock it, or create one, in one step: if several drivers start at the same
    time, one works on the run and the others get an error."""
    with lock_runs(store):
        folder = find_unfinished(store, header)
        if folder is not None:
            locks.enter_context(folder.lock())
            if not folder.is_finished:  # its driver may have finished before we had the lock
                return folder, _as_begun(folder, config), True
            locks.close()
        folder = RunFolder(store, new_run_id())
        locks.enter_context(folder.lock())
        folder.write_config(header, resolved.to_yaml())
        return folder, resolved, False


def _as_begun(folder: RunFolder, config: RunConfig) -> RunConfig:
    """The configuration with the dtype and attention that the run started with."""
    saved = (folder.read_config() or {})["backbone"]
    decided = {"dtype": saved["dtype"], "attention": saved["attention"]}
    return config.model_copy(update={"backbone": config.backbone.model_copy(update=decided)})


def _recipe(config: RunConfig) -> Recipe:
    return Recipe(
        config.method,
        config.train,
        config.data.max_length,
        config.registry.prefix_name,
        config.artifact,
    )
