"""One value of a row at a time: texts, user ids, splits, weights.

What files hold is read as what it plainly means, whatever type an export gave it; what is
ambiguous is refused with a short reason that says how to write it.
"""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any
from uuid import UUID

from ptuning.errors import DataError
from ptuning.types import Split

Notes = Counter[tuple[str, str]]  # (kind, subject) -> rows: readings that people should know of

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
_EXACT = 1 << 53  # whole floats are exact below


def read_text(value: object, name: str, *, numbers: bool = False) -> str:
    """Text, or bytes that are UTF-8; with `numbers`, whole numbers as their digits."""
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
    raise DataError(f"{name} is not a string but {kind_of(value)}")


def read_user_id(value: object, notes: Notes | None = None) -> str:
    """The id's text: as it is, or of a whole number, a UUID or UTF-8 bytes. Never empty.

    A text id is kept byte for byte: blanks at its ends too, and an id of blanks is an id.
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
            notes["number_id", kind_of(value)] += 1
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
        raise DataError("user_id is a number that is not whole (write it as text)")
    raise DataError(f"user_id is not a string but {kind_of(value)}")


def read_split(value: object, notes: Notes | None = None) -> Split | None:
    """A split by one of its usual names, in any case; None for an empty text."""
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
    """Whether the row is learned from: its weight is 1 or absent, not 0. Others are refused."""
    if value is None or value == "":
        return True
    try:
        number: Any = value if isinstance(value, (int, float, Decimal)) else float(str(value))
    except ValueError:
        number = None
    if number not in (0, 1):
        raise DataError("weight is neither 0 nor 1 (other weights are not supported)")
    return bool(number)


def kind_of(value: object) -> str:
    """What a value is, in a reason's words."""
    names = {"NoneType": "missing", "dict": "an object", "list": "a list"}
    return names.get(type(value).__name__, type(value).__name__)
