"""The methods that `method.type` names."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ptuning.methods.base import Tuning
from ptuning.methods.prefix import PrefixTuning
from ptuning.methods.prompt import PromptTuning
from ptuning.methods.ptuning import PTuning

METHODS: dict[str, type[Tuning]] = {
    "prefix": PrefixTuning,
    "prompt": PromptTuning,
    "ptuning": PTuning,
}
AnyMethod = Annotated[PrefixTuning | PromptTuning | PTuning, Field(discriminator="type")]
