"""ptuning: one frozen language model, one small trained prefix per user.

    backbone = ptuning.load_backbone("smollm2")
    result = ptuning.tune(backbone, {"alice": [ptuning.Example(prompt="…", completion="…"), …]})
    ptuning.generate(backbone, ["…"], [result["alice"].prefix])

Needs torch and transformers only. Names are imported when they are first used, so that
`import ptuning` itself is instant.
"""

# ruff: noqa: F401 - the TYPE_CHECKING imports mirror _HOMES
from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

# The tokenizers library warns in forked workers unless this is decided beforehand.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if TYPE_CHECKING:
    from ptuning.artifact import ArtifactConfig, Prefix
    from ptuning.backbone import Backbone
    from ptuning.data.encode import Encoded
    from ptuning.data.examples import DataConfig
    from ptuning.errors import PTuningError
    from ptuning.evaluate import GateConfig, encode, nll
    from ptuning.facts import BackboneConfig
    from ptuning.generate import generate
    from ptuning.load import load_backbone
    from ptuning.methods.prefix import PrefixTuning
    from ptuning.methods.prompt import PromptTuning
    from ptuning.methods.ptuning import PTuning
    from ptuning.peft_format import load_peft, save_peft
    from ptuning.train.config import TrainConfig
    from ptuning.train.resume import Resume
    from ptuning.tune import TuneResult, tune
    from ptuning.types import Example, Message, user_key

__version__ = "0.1.0"

_HOMES = {
    "ArtifactConfig": "artifact",
    "Backbone": "backbone",
    "BackboneConfig": "facts",
    "DataConfig": "data.examples",
    "Encoded": "data.encode",
    "Example": "types",
    "GateConfig": "evaluate",
    "Message": "types",
    "PTuning": "methods.ptuning",
    "PTuningError": "errors",
    "Prefix": "artifact",
    "PrefixTuning": "methods.prefix",
    "PromptTuning": "methods.prompt",
    "Resume": "train.resume",
    "TrainConfig": "train.config",
    "TuneResult": "tune",
    "encode": "evaluate",
    "generate": "generate",
    "load_backbone": "load",
    "load_peft": "peft_format",
    "nll": "evaluate",
    "save_peft": "peft_format",
    "tune": "tune",
    "user_key": "types",
}
__all__ = sorted(_HOMES)


class _Facade(ModuleType):
    """Importing a submodule would put it over the public function of its name (`tune`,
    `generate`); this keeps the function. Import the module's own names from it instead."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Facade


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ptuning' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ptuning.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
