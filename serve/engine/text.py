"""Tokens to text, piece by piece: whole characters only, and nothing of a stop string.

A byte-level token can be part of a character, so text is held back while it ends in one;
text that could be the beginning of a stop string is held back too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_PART = "\ufffd"  # what decoders write for bytes that are no whole character


class TextStream:
    """The text of one growing list of tokens.

    `push` and `finish` return what may go out now; together they return the decoded text up
    to the first stop string. Decoding starts at a recent token, not at the first, so a long
    answer costs no more per token than a short one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._from, self._until = 0, 0  # tokens whose text is out: context, and its end
        self._pending = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that this token completes; sets `stopped` where a stop string appeared."""
        self._ids.append(token)
        return self._cut(self._decode_fresh(final=False))

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
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
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
