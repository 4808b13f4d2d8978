"""The service on Ray Serve."""

from ptuning.system import environment

environment.set_defaults()  # Ray and MLflow read their variables when they are imported
