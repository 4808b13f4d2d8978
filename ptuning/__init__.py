"""ptuning: one frozen language model, one small trained prefix per user.

    backbone = ptuning.load_backbone("smollm2")
    result = ptuning.tune(backbone, {"alice": [ptuning.Example(prompt="…", completion="…"), …]})
    ptuning.generate(backbone, ["…"], [result["alice"].prefix])

It needs only torch and transformers. Names are imported on first use, so `import ptuning` is
instant.
"""

# ruff: noqa: F401 - the TYPE_CHECKING imports mirror _HOMES
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ptuning.methods import REGISTERED
from ptuning.system import environment

environment.set_defaults("TOKENIZERS_PARALLELISM")  # must be set before a tokenizer is created

if TYPE_CHECKING:
    from ptuning.data.encode import Encoded
    from ptuning.data.examples import DataConfig
    from ptuning.errors import PTuningError
    from ptuning.gate import GateConfig
    from ptuning.generation import generate
    from ptuning.methods.prefix import PrefixTuning
    from ptuning.methods.prompt import PromptTuning
    from ptuning.methods.ptuning import PTuning
    from ptuning.model.backbone import Backbone
    from ptuning.model.facts import BackboneConfig
    from ptuning.model.load import load_backbone
    from ptuning.prefix.artifact import ArtifactConfig, Prefix
    from ptuning.prefix.peft_format import load_peft, save_peft
    from ptuning.scoring import encode, nll
    from ptuning.train.config import TrainConfig
    from ptuning.train.resume import Resume
    from ptuning.tuning import TuneResult, iter_tune, tune
    from ptuning.types import Example, Message, user_key

__version__ = "0.1.0"

_HOMES = {
    "ArtifactConfig": "prefix.artifact",
    "Backbone": "model.backbone",
    "BackboneConfig": "model.facts",
    "DataConfig": "data.examples",
    "Encoded": "data.encode",
    "Example": "types",
    "GateConfig": "gate",
    "Message": "types",
    "PTuningError": "errors",
    "Prefix": "prefix.artifact",
    "Resume": "train.resume",
    "TrainConfig": "train.config",
    "TuneResult": "tuning",
    "encode": "scoring",
    "generate": "generation",
    "iter_tune": "tuning",
    "load_backbone": "model.load",
    "load_peft": "prefix.peft_format",
    "nll": "scoring",
    "save_peft": "prefix.peft_format",
    "tune": "tuning",
    "user_key": "types",
    **{name: f"methods.{file}" for name, file in REGISTERED.items()},
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ptuning' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ptuning.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
