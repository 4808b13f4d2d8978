"""Decode tokens to text piece by piece: only complete characters, and nothing of a stop string.

A byte-level token can be part of a character, so text is held back while it ends in an incomplete
character. Text that could be the beginning of a stop string is held back too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_PART = "\ufffd"  # the replacement character, which decoders write for an incomplete character


class TextStream:
    """The text of a growing list of tokens.

    `push` and `finish` return text that can be sent; together they return the decoded text up to
    the first stop string. Decoding starts at a recent token, so the cost per token does not grow
    with the length of the answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._from, self._until = 0, 0  # the range of tokens already sent that serves as context
        self._pending = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token completes; sets `stopped` if there is a stop string."""
        self._ids.append(token)
        return self._cut(self._decode_fresh(final=False))

    def finish(self) -> str:
        """The text held back so far, at the end of the answer."""
        if self.stopped:
            return ""
        out = self._cut(self._decode_fresh(final=True))
        pending, self._pending = self._pending, ""
        return out + pending

    def _decode_fresh(self, *, final: bool) -> str:
        known = self._decode(self._ids[self._from : self._until])
        text = self._decode(self._ids[self._from :])
        if len(text) <= len(known) or (text.endswith(_PART) and not final):
            return ""
        self._from, self._until = self._until, len(self._ids)
        return text[len(known) :]

    def _cut(self, fresh: str) -> str:
        if not self._stops or self.stopped:
            return "" if self.stopped else fresh
        text = self._pending + fresh
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._pending = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that is a prefix of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
