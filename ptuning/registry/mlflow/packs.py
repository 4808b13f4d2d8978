"""One MLflow run per pack, identified by a tag that is set when the run is created."""

from __future__ import annotations

import hashlib

from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException

from ptuning.registry.base import PackRecord
from ptuning.registry.mlflow.connection import Connection
from ptuning.registry.names import (
    RUN_NAMESPACE,
    RUN_PACK_ID,
    RUN_PACK_KEY,
    RUN_RUN_ID,
    Scope,
)

_BATCH = 100  # parameters of one call


def open_run(to: Connection, scope: Scope, experiment: str, pack: PackRecord) -> Run:
    """The pack's run, with its parameters and metrics; created if there is none."""
    key = _pack_key(scope, pack)
    experiment_id = _experiment_id(to, experiment)
    found = to.runs.search_runs([experiment_id], f"tags.`{RUN_PACK_KEY}` = '{key}'", max_results=1)
    run = found[0] if found else _create_run(to, scope, experiment_id, pack, key)
    if run.info.status != "FINISHED":
        _log(to, run, pack)
    return run


def close_run(to: Connection, run: Run) -> None:
    """Mark the pack as registered."""
    if run.info.status != "FINISHED":
        to.runs.set_terminated(run.info.run_id)


def _create_run(to: Connection, scope: Scope, experiment: str, pack: PackRecord, key: str) -> Run:
    tags = {
        RUN_PACK_KEY: key,
        RUN_NAMESPACE: scope.namespace,
        RUN_RUN_ID: pack.run_id,
        RUN_PACK_ID: pack.pack_id,
    }
    return to.runs.create_run(experiment, tags=tags, run_name=f"{pack.run_id}/{pack.pack_id}")


def _log(to: Connection, run: Run, pack: PackRecord) -> None:
    # MLflow refuses to change a parameter. With the run's start time as timestamp, a metric that is
    # written twice is the same point.
    params = [Param(k, str(v)) for k, v in pack.params.items() if k not in run.data.params]
    metrics = [
        Metric(k, float(v), run.info.start_time, 0)
        for k, v in pack.metrics.items()
        if k not in run.data.metrics
    ]
    for start in range(0, max(len(params), len(metrics)), _BATCH):
        chunk = slice(start, start + _BATCH)
        to.runs.log_batch(run.info.run_id, metrics=metrics[chunk], params=params[chunk])


def _experiment_id(to: Connection, name: str) -> str:
    found = to.runs.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # Runs have no artifacts. By default the embedded registry would record a folder below the
    # working directory of the first run.
    place = "mlflow-artifacts:/ptuning" if to.sqlite else None
    try:
        return str(to.runs.create_experiment(name, artifact_location=place))
    except MlflowException as error:
        found = to.runs.get_experiment_by_name(name)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
            raise
        return str(found.experiment_id)  # another process was first


def _pack_key(scope: Scope, pack: PackRecord) -> str:
    """A hash of (namespace, run_id, pack_id), 64 hex digits: safe in a filter, whatever these
    contain. The namespace is included because two stores may use the same run id."""
    text = f"{scope.namespace}\x1f{pack.run_id}\x1f{pack.pack_id}"
    return hashlib.sha256(text.encode()).hexdigest()
