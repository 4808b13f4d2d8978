"""The exception hierarchy, with a single root.

An error has fields for what was seen, what was expected and how to fix it, prints those that are
set, and survives pickling (Ray raises it again in another process). The reason for quarantining a
row is only a short message, because reasons are counted.
"""

from __future__ import annotations

from typing import Any


class PTuningError(Exception):
    """Root of every error that ptuning raises deliberately.

    `message` is one sentence; `seen`, `expected` and `fix` are optional and printed after it.
    Further keyword arguments become entries of `fields`.
    """

    def __init__(
        self,
        message: str,
        *,
        seen: object = None,
        expected: object = None,
        fix: str | None = None,
        **fields: Any,
    ) -> None:
        parts = [message]
        if seen is not None:
            parts.append(f"seen: {seen}")
        if expected is not None:
            parts.append(f"expected: {expected}")
        if fix is not None:
            parts.append(f"to fix: {fix}")
        super().__init__("; ".join(parts))
        self.message, self.seen, self.expected, self.fix = message, seen, expected, fix
        self.fields = fields

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"seen": self.seen, "expected": self.expected, "fix": self.fix, **self.fields}
        return (_rebuild, (type(self), self.message, state))


def _rebuild(cls: type[PTuningError], message: str, state: dict[str, Any]) -> PTuningError:
    return cls(message, **state)


class ConfigError(PTuningError):
    """A configuration value, key or file that cannot be used (exit code 2)."""


class DataError(PTuningError):
    """Input rows that cannot be used: unreadable files, too many bad rows."""


class TemplateError(DataError):
    """A prompt template that cannot encode an example."""


class BackboneError(PTuningError):
    """The frozen model cannot be loaded or used."""


class ModelNotFound(BackboneError):
    """No model with that name, directory or file."""


class UnsupportedModel(BackboneError):
    """The model's architecture cannot take a prefix inside its attention."""


class OutOfMemory(BackboneError):
    """The model does not fit into this machine's free memory."""


class BackboneChanged(BackboneError):
    """The frozen weights have changed: checksums differ."""


class MethodError(ConfigError):
    """A tuning method's settings cannot be used, or do not fit the backbone."""


class ArtifactError(PTuningError):
    """A prefix file that must not be used."""


class CorruptArtifact(ArtifactError):
    """Not a prefix file, truncated, or with another digest than the one requested."""


class WrongBackbone(ArtifactError):
    """The prefix was trained on another backbone."""


class WrongUser(ArtifactError):
    """The prefix belongs to another user or has another name."""


class WrongShape(ArtifactError):
    """The prefix's tensors do not have the backbone's shape."""


class WrongMethod(ArtifactError):
    """The prefix has a method or format that this version cannot use."""


class RegistryError(PTuningError):
    """The model registry refused, cannot be reached, or holds something unexpected."""


class RegistryUnreachable(RegistryError):
    """The model registry does not answer now; the same call may work later."""


class RunError(PTuningError):
    """A pipeline run cannot continue."""


class ServeError(PTuningError):
    """The service cannot start or answer."""
