"""Silence loggers that report every failed call to MLflow."""

from __future__ import annotations

import logging

# They log a traceback for each failed call (628 lines for one restart of PostgreSQL) and a line for
# each retry. The caller gets all of it in a RegistryError.
_LOUD = ("mlflow.store.db.utils", "urllib3.connectionpool")


def quiet_outages() -> None:
    """Silence MLflow's log lines about a registry that does not answer; we log that once.

    If a level has been set for these loggers, it is kept.
    """
    for name in _LOUD:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)
