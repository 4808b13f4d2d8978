"""One tiny backbone for the library's tests, on one thread: tests share the machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from registry_backends import (  # noqa: F401 - fixtures
    mlflow_registry,
    open_mlflow,
    open_scope,
    postgresql,
    postgresql_uri,
    registry,
    server_uri,
    sqlite_uri,
)
from store_backends import place, s3_server  # noqa: F401
from tiny_model import make_tokenizer

if TYPE_CHECKING:
    from ptuning.model.backbone import Backbone

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def backbone(tiny_model_dir: Path) -> Backbone:
    """The tiny Llama in fp32, loaded as users load it."""
    from ptuning.model.load import load_backbone

    return load_backbone(str(tiny_model_dir), dtype="float32", device="cpu")
