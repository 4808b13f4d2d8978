"""The resume file: the state needed to continue one user's training. Safetensors, no pickle.

It is written beside the prefix file if `train.keep_resume` is set; serving never reads it. Resuming
is exact: with a constant learning rate, epochs 1-2 followed by 3-4 give the same result as epochs
1-4 in one go. With warm-up or decay, the remaining steps follow the schedule of the new number of
epochs.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ptuning.errors import CorruptArtifact, WrongBackbone, WrongMethod, WrongUser
from ptuning.methods.base import Method
from ptuning.model.facts import Facts
from ptuning.system.files import write_atomic
from ptuning.train.state import TrainState
from ptuning.types import EpochLoss

FORMAT = "2"
_ANEW = "restore the file from a backup or train from the start"
_GROUPS = ("trained", "fixed", "first", "second", "best")
_NUMBERS: dict[str, type | tuple[type, ...]] = {
    "steps": int,
    "updates": int,
    "epoch": int,
    "tokens": int,
    "best_loss": (int, float, type(None)),
    "since": int,
    "scale": (int, float),
    "resets": int,
    "history": list,
}


@dataclass(frozen=True)
class Belongs:
    """Which training a state belongs to. `settings` is a digest of everything that determines the
    training except the number of epochs and `started_from`, the digest of the start prefix."""

    user_key: str
    prefix_name: str
    backbone_fingerprint: str
    settings: str
    started_from: str = ""


@dataclass(frozen=True, repr=False)
class Resume:
    """One user's training state, one part per member."""

    states: tuple[TrainState, ...]
    belongs: Belongs

    def __repr__(self) -> str:
        """One line, without tensors."""
        epochs = max((state.epoch for state in self.states), default=0)
        return f"Resume(user={self.belongs.user_key[:8]}, epochs={epochs})"

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
        """Write the file atomically: neither a reader nor a crash leaves half of it."""
        return write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Resume:
        """Read a resume file. Raises CorruptArtifact."""
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except OSError as error:
            raise CorruptArtifact(
                "the resume file cannot be read",
                seen=str(error),
                expected="a file that Resume.save wrote",
                fix="check the path",
            ) from error

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
                TrainState(**member_groups, **_check_numbers(value))
                for member_groups, value in zip(groups, numbers, strict=True)
            ]
            return cls(tuple(states), Belongs(**json.loads(texts["belongs"])))
        except (SafetensorError, ValueError, KeyError, IndexError, TypeError) as error:
            raise CorruptArtifact(
                "not a resume file, or cut short",
                seen=f"{len(data)} bytes: {error}",
                expected="a file that Resume.save wrote",
                fix=_ANEW,
            ) from error

    def check(self, expected: Belongs, method: Method, facts: Facts, epochs: int) -> None:
        """Raise an ArtifactError unless this state can continue the training that `expected`
        describes, with `method`, up to `epochs`."""
        actual = self.belongs
        if (actual.user_key, actual.prefix_name) != (expected.user_key, expected.prefix_name):
            raise WrongUser(
                "the training state is of another user or prefix",
                seen=f"{actual.user_key} {actual.prefix_name}",
                expected=f"{expected.user_key} {expected.prefix_name}",
                fix="pass the state of the user and prefix to be trained",
            )
        if actual.backbone_fingerprint != expected.backbone_fingerprint:
            raise WrongBackbone(
                "the training state is of another backbone",
                seen=actual.backbone_fingerprint[:12],
                expected=expected.backbone_fingerprint[:12],
                fix="load the backbone that the training began on, or train from the start",
            )
        if actual.settings != expected.settings:
            raise WrongMethod(
                "the training state is of other settings or rows",
                seen=actual.settings[:12],
                expected=expected.settings[:12],
                fix="change only train.epochs when resuming, or start from the prefix instead "
                "(a warm start)",
            )
        trained = max((state.epoch for state in self.states), default=0)
        if trained > epochs:
            raise WrongMethod(
                "the training state is already past the requested epochs",
                seen=f"{trained} epochs",
                expected=f"at most {epochs}",
                fix="raise train.epochs, or train from the start",
            )
        if len(self.states) != method.members:
            raise _incomplete(f"{len(self.states)} states, of {method.members} members")
        for state in self.states:
            _check_state(state, method, facts, from_prefix=bool(actual.started_from))


def _check_numbers(numbers: dict[str, Any]) -> dict[str, Any]:
    """A state's numbers, checked. Raises KeyError or TypeError."""
    for name, expected_type in _NUMBERS.items():
        if not isinstance(numbers[name], expected_type):
            raise TypeError(f"{name} is {numbers[name]!r}")
    for line in numbers["history"]:
        EpochLoss(epoch=line["epoch"], train=line["train"], valid=line["valid"])
    return {name: numbers[name] for name in _NUMBERS}


def _check_state(state: TrainState, method: Method, facts: Facts, *, from_prefix: bool) -> None:
    """Raise CorruptArtifact unless the state's tensors are those the method trains and are finite.
    `from_prefix`: the training started from a prefix, so there is a start even for a method that
    starts at random."""
    shapes = method.shapes(facts)
    given = from_prefix or method.start_ids != "none"
    start = {name: torch.zeros(shape) for name, shape in shapes.items()} if given else None
    initial = method.initial(facts, start, seed=0)
    for group, wanted in (
        ("trained", _shapes(initial.trained)),
        ("first", _shapes(initial.trained)),
        ("second", _shapes(initial.trained)),
        ("fixed", _shapes(initial.fixed)),
        ("best", shapes),
    ):
        tensors = getattr(state, group)
        if (seen := _shapes(tensors)) != wanted:
            raise _incomplete(f"{group}: {seen}, expected {wanted}")
        if not all(bool(values.isfinite().all()) for values in tensors.values()):
            raise _incomplete(f"{group}: values that are not finite")


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(values.shape) for name, values in tensors.items()}


def _incomplete(seen: str) -> CorruptArtifact:
    return CorruptArtifact(
        "the training state is not complete",
        seen=seen,
        expected="finite tensors of the method's shapes, for each member",
        fix=_ANEW,
    )
