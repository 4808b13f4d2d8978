"""The registered methods by the name that `method.type` gives them.

A program can register methods of its own with `register`, before it loads a configuration or a
prefix that names them.
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

Kind = TypeVar("Kind", bound=Tuning)


def type_of(kind: type[Tuning]) -> str:
    """The name of a method in settings."""
    return str(kind.model_fields["type"].default)


def register(kind: type[Kind]) -> type[Kind]:
    """Make a method known by its `type`; a decorator. Raises MethodError where another has it."""
    name = type_of(kind)
    if METHODS.get(name, kind) is not kind:
        raise MethodError(
            "two tuning methods have one name",
            seen=f"{name}: {METHODS[name].__name__} and {kind.__name__}",
            expected="a type of its own for each",
            fix=f"give {kind.__name__} another type",
        )
    METHODS[name] = kind
    return kind


for _name, _file in REGISTERED.items():
    register(getattr(import_module(f"ptuning.methods.{_file}"), _name))


def default_method() -> Tuning:
    """The method that is used where none is named, with its default settings."""
    return METHODS[DEFAULT]()


def parse_method(settings: object) -> Tuning:
    """A method from its settings, `type` among them. Raises MethodError.

    >>> parse_method({"type": "prompt", "ensemble": 2}).members
    2
    """
    if isinstance(settings, Tuning):
        return settings
    name = settings.get("type") if isinstance(settings, Mapping) else settings
    kind = METHODS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise MethodError(
            "no such tuning method",
            seen=f"method.type={name!r}",
            expected=", ".join(METHODS),
            fix="use one of these",
        )
    return kind.model_validate(settings)


# The type of a configuration's field that holds any registered method.
AnyMethod = Annotated[SerializeAsAny[Tuning], PlainValidator(parse_method)]
