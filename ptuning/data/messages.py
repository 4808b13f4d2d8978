"""Read conversations from files as turns with a role and text.

Accepted are lists of objects with role and content (OpenAI) or from and value (ShareGPT), lists of
key-value pairs (Arrow maps), an object of lists, any of these as JSON text, and content in several
text parts, which are joined as in the service.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ptuning.data.values import Notes, describe_type, read_text
from ptuning.errors import DataError
from ptuning.types import Message

ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "function": "tool",
    "human": "user",
    "gpt": "assistant",
}

Turn = Mapping[Any, Any]


def read_turns(value: Any) -> list[Turn]:
    """The turns of a conversation as objects, whatever its format. Raises DataError if it is not a
    list."""
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError("messages is not valid JSON") from None
    if isinstance(value, Mapping) and value and all(map(_is_list, value.values())):
        columns: list[Any] = list(value.values())
        if len({len(column) for column in columns}) > 1:
            raise DataError("messages is an object of lists that differ in length")
        value = [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if not _is_list(value):
        raise DataError(f"messages is not a list but {describe_type(value)}")
    return [_object(item) for item in value]


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _object(item: Any) -> Turn:
    if isinstance(item, Mapping):
        return item
    if _is_list(item) and item and all(_is_list(pair) and len(pair) == 2 for pair in item):
        return dict(item)
    raise DataError(f"a message is not an object but {describe_type(item)}")


def read_messages(turns: Sequence[Turn], notes: Notes | None = None) -> tuple[Message, ...]:
    """Convert turns to messages. Raises DataError unless the last is the assistant's, with text."""
    if not turns:
        raise DataError("messages is empty")
    messages = tuple(read_message(turn, notes) for turn in turns)
    if messages[-1].role != "assistant":
        raise DataError("the last message is not from the assistant")
    if not messages[-1].content:
        raise DataError("completion is empty")
    return messages


def read_message(turn: Turn, notes: Notes | None = None) -> Message:
    """Convert one turn to a message. Raises DataError."""
    role, content = turn.get("role"), turn.get("content")
    if role is None and content is None:
        role, content = turn.get("from"), turn.get("value")
    name = read_text(role, "a message's role")
    if name not in ROLE_NAMES:
        raise DataError(f"a message's role is not one of {', '.join(ROLE_NAMES)}")
    if content is None and (turn.get("tool_calls") or turn.get("function_call")):
        content = ""  # the chat template gets only text, so the tool call is lost
        if notes is not None:
            notes["tool_call", ""] += 1
    return Message(role=ROLE_NAMES[name], content=_content(content))


def _content(value: object) -> str:
    if not isinstance(value, (list, tuple)):
        return read_text(value, "a message's content")
    return "".join(_part(part) for part in value)


def _part(part: object) -> str:
    if isinstance(part, Mapping):
        if part.get("type", "text") != "text":
            raise DataError(f"a message has a part that is not text but {str(part['type'])[:20]}")
        part = part.get("text")
    return read_text(part, "a part of a message's content")
