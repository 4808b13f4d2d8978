"""The run's only contact with the service: its configuration, starting it, and telling it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from serve.config import ServeConfig

from ptuning.store import Store

if TYPE_CHECKING:
    from pipelines.config import RunConfig

__all__ = ["ServeConfig", "deploy", "serve_forever"]


def deploy(config: ServeConfig, store: Store, promoted: Mapping[str, str]) -> None:
    """Champions are deployed by their alias: a running service reads it within
    `serve.refresh_seconds`, so there is nothing to push and nothing to restart."""


def serve_forever(config: RunConfig, store: str) -> None:
    """Run the service until it is stopped."""
    import serve.app

    serve.app.run(
        config.serve,
        store=Store(store).root,
        backbone=config.backbone,
        template=config.data.template,
        registry=config.registry,
    )
