"""The registry on MLflow: the only package that imports it.

What stands where: one registered model per (namespace, backbone, user, prefix name), one version
per digest, one run per pack. A run per user would be the usual MLflow picture, but costs three
times as much to write (40 against 118 users/s) and nobody reads a million runs; so a user's
figures are tags and a description of the version, which is what the UI's version page shows, and
the run holds the pack's.

    registry    MlflowRegistry: the protocol
    connection  clients, threads, and what MLflow's errors mean
    owner       whose a namespace is
    reading     models, aliases and versions, many users a query
    writing     versions and what they say
    packs       one MLflow run per pack
    databases   drivers, schemas, locks, durability
    artifacts   the plugin through which MLflow itself finds a prefix file
    settings    MLflow's environment

This module imports nothing: MLflow loads `artifacts` in the middle of its own import.
"""
