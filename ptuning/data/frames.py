"""Rows out of a table in memory: pandas, polars or pyarrow, none of which is imported here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ptuning.data.columns import Columns
from ptuning.data.values import read_user_id
from ptuning.errors import DataError

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class Frame(Protocol):
    """A table with named columns. What else it needs is one of three ways to list its rows."""

    @property
    def columns(self) -> Any: ...


def is_frame(value: object) -> TypeIs[Frame]:
    """Whether it is a table that `frame_rows` reads: it has columns and can list its rows."""
    kinds = ("iter_rows", "to_pylist", "iterrows")
    return hasattr(value, "columns") and any(hasattr(value, kind) for kind in kinds)


def frame_rows(frame: Any) -> Iterable[Mapping[str, object]]:
    """Its rows by column; what is missing is None (pandas has NaN, NaT and NA for it)."""
    if hasattr(frame, "iter_rows"):  # polars
        rows: Iterable[Mapping[str, object]] = frame.iter_rows(named=True)
    elif hasattr(frame, "to_pylist"):  # pyarrow
        rows = frame.to_pylist()
    else:  # pandas
        rows = frame.astype(object).where(frame.notna(), None).to_dict(orient="records")
    return rows


def frame_users(frame: Any, columns: Columns) -> dict[str, list[Mapping[str, object]]]:
    """A table's rows by user, users in the order in which they first stand there. Raises
    DataError where a row names no user: it could be anybody's.

    Example: `frame_users(pandas.read_csv("rows.csv"), Columns())`.
    """
    users: dict[str, list[Mapping[str, object]]] = {}
    for number, row in enumerate(frame_rows(frame)):
        source = columns.layout(tuple(row)).sources.get("user_id")
        if source is None:
            raise DataError(
                "the table has no column that names the user",
                seen=", ".join(map(str, row)),
                expected="a column `user_id`",
                fix="rename it, or say data=DataConfig(columns={'user_id': 'its name'})",
            )
        try:
            user_id = read_user_id(row[source])
        except DataError as error:
            raise DataError(
                "a row of the table names no user",
                seen=f"row {number}: {error}",
                expected=f"an id in `{source}`",
                fix="leave the row out, or give it its user",
            ) from error
        users.setdefault(user_id, []).append(row)
    return users
