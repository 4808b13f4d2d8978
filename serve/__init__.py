"""The service on Ray Serve."""

from ptuning.system import environment

environment.set_defaults()  # Ray and MLflow read these variables at import
