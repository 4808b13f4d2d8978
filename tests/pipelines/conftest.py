"""Fixtures for the run's tests: an empty store, and the tiny tokenizer's template."""

from __future__ import annotations

from pathlib import Path

import pytest
from salted import store_salt  # noqa: F401
from tiny_model import make_tokenizer

from ptuning.data.encode import Template
from ptuning.store import Store


@pytest.fixture(scope="session")
def template() -> Template:
    return Template.of(make_tokenizer())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")
