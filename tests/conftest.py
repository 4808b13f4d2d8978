"""Fixtures for all tests: one local Ray for the test session, one tiny model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tiny_model import save_model

from ptuning.system import environment

# Read when Ray and Transformers are imported, so they are set before any test imports them.
environment.set_defaults()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# No deadline per example: a busy machine is not a failure. pytest-timeout bounds the whole test.
settings.register_profile("ptuning", deadline=None)
settings.load_profile("ptuning")


@pytest.fixture(autouse=True)
def registry_log_level() -> Iterator[None]:
    """Restore the log level: a command called in this process silences the registry's log."""
    logger = logging.getLogger("ptuning.registry")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with 4 logical CPUs, shared by all tests that need one.

    `pytest-timeout` bounds the time it takes to start.
    """
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=200 << 20,
        namespace="ptuning-tests",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer, as `save_pretrained` writes it."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    save_model(directory)
    return directory
