"""Access to private names of other libraries, which a release may remove."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ptuning.errors import PTuningError


def get_private(module: ModuleType, name: str) -> Any:
    """A private name of a library that we rely on. Raises PTuningError if it is gone: continuing
    without it could, for instance, leave a port open unnoticed."""
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise PTuningError(
            "a library no longer has something that ptuning relies on",
            seen=f"no {module.__name__}.{name}",
            expected="a release that ptuning was tested with (constraints.txt)",
            fix=f"install the tested release of {module.__name__.split('.')[0]}",
        ) from error


def set_private(module: ModuleType, name: str, value: object) -> None:
    """Set a private name of a library. Raises PTuningError if it is gone."""
    get_private(module, name)
    setattr(module, name, value)
