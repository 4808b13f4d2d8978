"""The registered methods, by their name in `method.type`.

A program can add methods with `register`, before it loads a configuration or a prefix that names
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, TypeVar

from pydantic import PlainValidator, SerializeAsAny

from ptuning.errors import MethodError
from ptuning.methods import DEFAULT, REGISTERED
from ptuning.methods.base import Tuning

METHODS: dict[str, type[Tuning]] = {}

T = TypeVar("T", bound=Tuning)


def type_of(method: type[Tuning]) -> str:
    """The name of a method in settings."""
    return str(method.model_fields["type"].default)


def register(method: type[T]) -> type[T]:
    """A class decorator that registers a method under its `type`. Raises MethodError if another
    method has that type."""
    name = type_of(method)
    if METHODS.get(name, method) is not method:
        raise MethodError(
            "two tuning methods have the same name",
            seen=f"{name}: {METHODS[name].__name__} and {method.__name__}",
            expected="a different type for each",
            fix=f"give {method.__name__} another type",
        )
    METHODS[name] = method
    return method


for _name, _file in REGISTERED.items():
    register(getattr(import_module(f"ptuning.methods.{_file}"), _name))


def default_method() -> Tuning:
    """The default method, with its default settings."""
    return METHODS[DEFAULT]()


def parse_method(settings: object) -> Tuning:
    """Make a method from its settings, including `type`. Raises MethodError.

    >>> parse_method({"type": "prompt", "ensemble": 2}).members
    2
    """
    if isinstance(settings, Tuning):
        return settings
    name = settings.get("type") if isinstance(settings, Mapping) else settings
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise MethodError(
            "no such tuning method",
            seen=f"method.type={name!r}",
            expected=", ".join(METHODS),
            fix="use one of these",
        )
    return method.model_validate(settings)


# The type of a configuration field for any registered method.
AnyMethod = Annotated[SerializeAsAny[Tuning], PlainValidator(parse_method)]
