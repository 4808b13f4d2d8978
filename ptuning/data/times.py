"""Convert times, in the formats that exports use, to epoch milliseconds.

The size of a number shows its unit: from 1973 on, the ranges of seconds, milliseconds,
microseconds and nanoseconds do not overlap. So each value is read by itself, and a file may mix
units. A number below 100 million is taken as a counter, of which only the order matters, and is
kept.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from email.utils import parsedate_to_datetime
from typing import Any

from ptuning.data.values import Notes, describe_type
from ptuning.errors import DataError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)
EARLIEST = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MS
LATEST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MS

_SECONDS, _MILLIS, _MICROS, _NANOS = 10**8, 10**11, 10**14, 10**17  # the smallest of each
_NUMBER = re.compile(r"[+-]?[0-9]{1,19}(\.[0-9]*)?", re.ASCII)
# Only the extended form: fromisoformat would also read the digits 20240131 as a date.
_ISO = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2})([T ].*?)?( ?(?:UTC|GMT)| [+-][0-9:]{3,6})?", re.A)
_MAIL = re.compile(
    r"([A-Z][a-z]{2}, )?[0-9]{1,2} [A-Z][a-z]{2} [0-9]{4} [0-9:]{5,8} "
    r"(GMT|UTC?|[ECMP][SD]T|[+-][0-9]{4})",
    re.ASCII,
)


class EpochMs(int):
    """Milliseconds from a typed column of times, so the unit is known."""


def read_time(value: object, notes: Notes | None = None) -> int | None:
    """Read a time as epoch milliseconds, rounded down; None for empty text or NaT.

    Accepts datetimes and dates, ISO 8601 and RFC 2822 (all UTC if without a zone), and numbers or
    their digits: epoch seconds, milliseconds, microseconds or nanoseconds, by size. Raises
    DataError. Example: `read_time("2024-05-01 10:00:00 UTC")` is 1714557600000.
    """
    if isinstance(value, EpochMs):
        return _in_range(int(value))
    if isinstance(value, str):
        text = value.strip()
        if text in ("", "NaT"):
            return None
        if not _NUMBER.fullmatch(text):
            return _in_range(_milliseconds(_parse(text)))
        value = Decimal(text) if "." in text else int(text)
    if isinstance(value, date):
        moment = value if isinstance(value, datetime) else datetime(*value.timetuple()[:3])
        return _milliseconds(moment)
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise DataError(f"timestamp is neither a time nor a number but {describe_type(value)}")
    if not math.isfinite(value):
        raise DataError("timestamp is not a finite number")
    return _in_range(_scale(value, notes))


def check_time(value: int) -> None:
    """Raise DataError if milliseconds are outside the years 1 to 9999."""
    _in_range(value)


def _scale(value: int | float | Decimal, notes: Notes | None) -> int:
    # Decimal of the float's text, because 1714557600.123 * 1000 is slightly too small.
    exact: Any = Decimal(str(value)) if isinstance(value, float) else value
    size: Any = abs(exact)
    if size < _SECONDS or _MILLIS <= size < _MICROS:
        return math.floor(exact)
    if size < _MILLIS:
        unit, result = "seconds", math.floor(exact * 1000)
    elif size < _NANOS:
        unit, result = "microseconds", math.floor(exact) // 1000
    else:
        unit, result = "nanoseconds", math.floor(exact) // 1_000_000
    if notes is not None:
        notes["epoch_unit", unit] += 1
    return result


def _milliseconds(moment: datetime) -> int:
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (aware - _EPOCH) // _MS


def _in_range(milliseconds: int) -> int:
    if not EARLIEST <= milliseconds <= LATEST:
        raise DataError("timestamp is outside the years 1 to 9999")
    return milliseconds


def _parse(text: str) -> datetime:
    try:
        if found := _ISO.fullmatch(text):
            day, clock, zone = found[1], found[2] or "", (found[3] or "").strip()
            return datetime.fromisoformat(day + clock + ("Z" if zone.isalpha() else zone))
        if _MAIL.fullmatch(text):
            return parsedate_to_datetime(text)
    except ValueError:
        pass
    raise DataError("timestamp is neither ISO 8601, RFC 2822 nor an epoch time")
