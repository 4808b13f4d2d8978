"""Encode prompts in several threads, so that a slow one does not delay others.

A fast tokenizer must not be reconfigured while another thread uses it, and every call may
reconfigure it. So each copy of the template is used by one thread at a time: it is taken from a
queue and put back. The trade-off: each copy needs a tokenizer's memory.
"""

from __future__ import annotations

import asyncio
import copy
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from ptuning.data.encode import Template
from ptuning.errors import ServeError
from ptuning.types import Message

_NO_LIMIT = 1 << 40  # prompts of requests are never cut


class Encoders:
    """`count` copies of a template, and as many threads."""

    def __init__(self, template: Template, count: int) -> None:
        self._free: queue.SimpleQueue[Template] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(copy.deepcopy(template))
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="ptuning-encode")
        self._closed = False

    async def encode(self, prompt: str | tuple[Message, ...]) -> list[int]:
        """The ids of the full prompt. Raises DataError, or ServeError after `close`."""
        if self._closed:
            raise ServeError("the service is shutting down")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode, prompt)

    def close(self) -> None:
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, prompt: str | tuple[Message, ...]) -> list[int]:
        template = self._free.get_nowait()  # never empty: there are as many copies as threads
        try:
            return template.encode_prompt(_replace_developer(prompt, template), _NO_LIMIT)
        finally:
            self._free.put(template)


def _replace_developer(
    prompt: str | tuple[Message, ...], template: Template
) -> str | Sequence[Message]:
    """Replace `developer`, OpenAI's newer name of the system role, by `system`, unless the chat
    template supports it."""
    if isinstance(prompt, str):
        return prompt
    chat_template = str(template.tokenizer.chat_template) if template.kind == "chat" else ""
    if "developer" in chat_template:
        return prompt
    return [replace(turn, role="system") if turn.role == "developer" else turn for turn in prompt]
