"""Read single values of a row: texts, user ids, splits, weights.

A value is read by its plain meaning, whatever type an export gave it. An ambiguous value is
refused with a short reason that says how to write it.
"""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any
from uuid import UUID

from ptuning.errors import DataError
from ptuning.types import Split

Notes = Counter[tuple[str, str]]  # (kind, subject) -> rows: interpretations worth reporting

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "eval": "valid",
    "evaluation": "valid",
    "test": "test",
    "testing": "test",
}
_EXACT = 1 << 53  # floats below this represent integers exactly


def read_text(value: object, name: str, *, numbers: bool = False) -> str:
    """Read text or UTF-8 bytes, or with `numbers` an integer as digits. Raises DataError."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise DataError(f"{name} is not valid UTF-8") from None
        return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{name} is not valid UTF-8") from None
    if numbers and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{name} is not a string but {describe_type(value)}")


def read_user_id(value: object, notes: Notes | None = None) -> str:
    """Read a user id as text, from text, an integer, a UUID or UTF-8 bytes. Raises DataError.

    A text id is kept byte for byte, including leading and trailing blanks; only the empty id is
    refused.
    """
    if isinstance(value, str):
        text = read_text(value, "user_id")
    elif isinstance(value, bytes):
        text = read_text(value, "user_id")
        if "\0" in text:
            raise DataError("user_id is raw bytes (write it as text)")
    elif isinstance(value, UUID):
        text = str(value)
    else:
        text = str(_whole(value))
        if notes is not None:
            notes["number_id", describe_type(value)] += 1
    if not text:
        raise DataError("user_id is empty")
    return text


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, (float, Decimal)):
        number: Any = value
        if number % 1 == 0 and (isinstance(value, Decimal) or abs(number) < _EXACT):
            return int(value)
        raise DataError("user_id is not an integer (write it as text)")
    raise DataError(f"user_id is not a string but {describe_type(value)}")


def read_split(value: object, notes: Notes | None = None) -> Split | None:
    """Read a split by one of its usual names, in upper or lower case; None for empty text."""
    text = read_text(value, "split").strip()
    if not text:
        return None
    split = SPLIT_NAMES.get(text.lower())
    if split is None:
        raise DataError(f"split is not one of train, valid, test but {text[:20]!r}")
    if split != text and notes is not None:
        notes["split_name", f"{text[:20]} as {split}"] += 1
    return split


def read_weight(value: object) -> bool:
    """Whether the row is trained on: its weight is 1 or missing, not 0. Other weights raise
    DataError."""
    if value is None or value == "":
        return True
    try:
        number: Any = value if isinstance(value, (int, float, Decimal)) else float(str(value))
    except ValueError:
        number = None
    if number not in (0, 1):
        raise DataError("weight is neither 0 nor 1 (other weights are not supported)")
    return bool(number)


def describe_type(value: object) -> str:
    """A value's type, as a reason names it."""
    names = {"NoneType": "missing", "dict": "an object", "list": "a list"}
    return names.get(type(value).__name__, type(value).__name__)
