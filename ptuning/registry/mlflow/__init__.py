"""The registry on MLflow; no other package imports MLflow.

There is one registered model per (namespace, backbone, user, prefix name), one version per digest
and one run per pack. One run per user would be usual in MLflow, but costs three times as much to
write (40 against 118 users/s), and nobody reads a million runs. So a user's metrics are in the
version's tags and description, which the UI shows on the version page, and the run has the pack's.

    registry    MlflowRegistry: the protocol
    connection  clients, threads, and the meaning of MLflow's errors
    owner       the owner of a namespace
    reading     models, aliases and versions, many users per query
    writing     versions and their tags
    packs       one MLflow run per pack
    databases   drivers, schemas, locks, durability
    artifacts   the plugin through which MLflow finds a prefix file
    quiet       silence MLflow's log lines during outages

This module imports nothing, because MLflow loads `artifacts` during its own import.
"""
