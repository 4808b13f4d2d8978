"""Run the service as the command line does, in a separate process, with settings as JSON."""

from __future__ import annotations

import json
import sys

from ptuning.model.facts import BackboneConfig
from serve.app import run
from serve.config import ServeConfig


def main() -> None:
    settings = json.loads(sys.argv[1])
    run(
        ServeConfig(**settings["serve"]),
        store=settings["store"],
        backbone=BackboneConfig(name=settings["model"], dtype="float32", device="cpu"),
        template="auto",
    )


if __name__ == "__main__":
    main()
