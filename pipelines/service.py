"""The pipelines' only dependency on the service: its configuration, and how to start it."""

from __future__ import annotations

from ptuning.data.encode import TemplateKind
from ptuning.model.facts import BackboneConfig
from ptuning.store import Store
from serve.config import ServeConfig

__all__ = ["ServeConfig", "serve_forever"]


def serve_forever(
    config: ServeConfig,
    store: Store,
    backbone: BackboneConfig,
    template: TemplateKind,
) -> None:
    """Run the service until it is stopped."""
    import serve.app

    serve.app.run(config, store=store.root, backbone=backbone, template=template)
