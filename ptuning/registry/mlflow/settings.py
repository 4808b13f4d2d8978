"""What MLflow is told before it is imported, and whose log lines are kept from the screen."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

# MLflow reads these when it is imported or when it asks.
MLFLOW_DEFAULTS: Mapping[str, str] = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    # By default a server that is down is asked for four minutes, a silent one for sixteen.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "PGCONNECT_TIMEOUT": "10",
}

# They print a traceback for each call that fails (628 lines for one restart of PostgreSQL) and
# a line for each retry. All of it is in the RegistryError that the caller gets.
_LOUD = ("mlflow.store.db.utils", "urllib3.connectionpool")


def set_defaults() -> None:
    """Set MLflow's environment; what the user has set stays."""
    for name, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)


def quiet_outages() -> None:
    """Keep MLflow's lines about a registry that does not answer from the log: ours says it.

    A level that somebody has set for these loggers stays.
    """
    for name in _LOUD:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)
