"""Stores that support conditional writes: a local disk and a real S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from waiting import wait_until

from ptuning.store import Store
from ptuning.system.ports import free_port

_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server in a separate process, also set in the environment."""
    pytest.importorskip("moto", reason="no moto: the S3 server of the dev extra")
    pytest.importorskip("s3fs", reason="no s3fs: extra s3")
    port = free_port()
    log = (tmp_path_factory.mktemp("s3") / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **_CREDENTIALS},
    )
    address = f"http://127.0.0.1:{port}"
    changed = {**_CREDENTIALS, "AWS_ENDPOINT_URL": address, "AWS_ENDPOINT_URL_S3": address}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)

    def answers() -> bool:
        try:
            return httpx.get(address, timeout=1).status_code < 500
        except httpx.HTTPError:
            return False

    try:
        wait_until(answers, 60, every_s=0.1)
        yield address
    finally:
        process.terminate()
        process.wait(30)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def make_bucket() -> str:
    import s3fs

    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem().call_s3("create_bucket", Bucket=bucket)
    return bucket


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store."""
    if request.param == "local":
        return Store(tmp_path / "store")
    request.getfixturevalue("s3_server")
    return Store(f"s3://{make_bucket()}/some/prefix")
