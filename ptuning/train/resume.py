"""The resume file: what continues one user's training. Safetensors, no pickle.

Beside the prefix file, only where it is asked for (`train.keep_resume`); serving never reads
it. Going on is exact: under a constant learning rate, epochs 1-2 and then 3-4 give what 1-4 at
once give. Under a decaying one the rest follows the schedule of the new number of epochs.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ptuning.artifact import write_file
from ptuning.errors import CorruptArtifact, WrongBackbone, WrongMethod, WrongUser
from ptuning.train.state import TrainState

FORMAT = "1"
_GROUPS = ("trained", "fixed", "first", "second", "best")
_NUMBERS = ("steps", "epoch", "tokens", "best_loss", "since", "scale", "resets", "history")


@dataclass(frozen=True)
class Belongs:
    """What a training state belongs to. `settings`: digest of all that decides the training
    except the number of epochs."""

    user_key: str
    prefix_name: str
    backbone_fingerprint: str
    settings: str


@dataclass(frozen=True)
class Resume:
    """One user's training state, one part per member."""

    states: tuple[TrainState, ...]
    belongs: Belongs

    def to_bytes(self) -> bytes:
        tensors: dict[str, Tensor] = {}
        for member, state in enumerate(self.states):
            for group in _GROUPS:
                for name, values in getattr(state, group).items():
                    tensors[f"{member}.{group}.{name}"] = values.detach().cpu().contiguous()
        numbers = [{name: getattr(state, name) for name in _NUMBERS} for state in self.states]
        texts = {"format": FORMAT, "belongs": json.dumps(vars(self.belongs), sort_keys=True)}
        return save_safetensors(tensors, {**texts, "states": json.dumps(numbers)})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file; a reader or a crash never meets half of it."""
        return write_file(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Resume:
        """Read a resume file. Raises CorruptArtifact."""
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except OSError as error:
            raise CorruptArtifact("the resume file cannot be read", seen=str(error)) from error

    @classmethod
    def from_bytes(cls, data: bytes) -> Resume:
        """As `load`, from bytes already read."""
        try:
            tensors = load_safetensors(data)
            size = int.from_bytes(data[:8], "little")
            texts = json.loads(data[8 : 8 + size]).get("__metadata__", {})
            if texts.get("format") != FORMAT:
                raise ValueError(f"format {texts.get('format')}, expected {FORMAT}")
            numbers: list[dict[str, Any]] = json.loads(texts["states"])
            groups: list[dict[str, Any]] = [{group: {} for group in _GROUPS} for _ in numbers]
            for key, values in tensors.items():
                member, group, name = key.split(".", 2)
                groups[int(member)][group][name] = values
            states = [
                TrainState(**own, **{key: value[key] for key in _NUMBERS})
                for own, value in zip(groups, numbers, strict=True)
            ]
            return cls(tuple(states), Belongs(**json.loads(texts["belongs"])))
        except (SafetensorError, ValueError, KeyError, IndexError, TypeError) as error:
            raise CorruptArtifact(
                "not a resume file, or cut short", seen=f"{len(data)} bytes: {error}"
            ) from error

    def check(self, expected: Belongs) -> None:
        """Raise unless this state continues the training that `expected` describes."""
        own = self.belongs
        if (own.user_key, own.prefix_name) != (expected.user_key, expected.prefix_name):
            raise WrongUser(
                "the training state is of another user or prefix",
                seen=f"{own.user_key} {own.prefix_name}",
                expected=f"{expected.user_key} {expected.prefix_name}",
            )
        if own.backbone_fingerprint != expected.backbone_fingerprint:
            raise WrongBackbone(
                "the training state is of another backbone",
                seen=own.backbone_fingerprint[:12],
                expected=expected.backbone_fingerprint[:12],
            )
        if own.settings != expected.settings:
            raise WrongMethod(
                "the training state is of other settings or rows",
                seen=own.settings[:12],
                expected=expected.settings[:12],
                fix="only train.epochs may change where a training goes on; "
                "start from the prefix instead (a warm start)",
            )
