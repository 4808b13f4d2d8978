"""On which addresses the service may listen, and which users a key may name."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from ptuning.errors import ConfigError
from serve.config import ServeConfig
from serve.events import Refused
from serve.http.auth import Keys, check_exposure, is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_credentials(host: str) -> None:
    assert is_loopback(host)
    check_exposure(ServeConfig(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_addresses_beyond_loopback_need_credentials(host: str) -> None:
    with pytest.raises(ConfigError, match="api_keys_file"):
        check_exposure(ServeConfig(host=host))
    check_exposure(ServeConfig(host=host, api_keys_file="keys.json"))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"": "*"}', '{"k": "alice"}', '{"k": [1]}', '{"k": null}']
)
def test_a_keys_file_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        Keys.read(str(path))
    with pytest.raises(ConfigError):
        Keys.read(str(tmp_path / "missing.json"))


def test_a_refusal_survives_pickling() -> None:
    error = Refused("no", status=404, code="c", param="p")
    again = pickle.loads(pickle.dumps(error))
    assert again.problem == error.problem
