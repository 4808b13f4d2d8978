"""Whose log lines are kept from the screen while MLflow is asked."""

from __future__ import annotations

import logging

# They print a traceback for each call that fails (628 lines for one restart of PostgreSQL) and
# a line for each retry. All of it is in the RegistryError that the caller gets.
_LOUD = ("mlflow.store.db.utils", "urllib3.connectionpool")


def quiet_outages() -> None:
    """Keep MLflow's lines about a registry that does not answer from the log: ours says it.

    A level that somebody has set for these loggers stays.
    """
    for name in _LOUD:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)
