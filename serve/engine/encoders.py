"""Prompts to tokens in several threads, so that a slow one holds nobody up.

A fast tokenizer may not be reconfigured while another thread uses it, and every call may
reconfigure it. So each copy of the template is used by one thread at a time: it is taken out
of a queue and put back. The price is a tokenizer's memory for each copy.
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

_NO_LIMIT = 1 << 40  # nothing of a request is cut


class Encoders:
    """`count` copies of a template, as many threads."""

    def __init__(self, template: Template, count: int) -> None:
        self._free: queue.SimpleQueue[Template] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(copy.deepcopy(template))
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="ptuning-encode")
        self._closed = False

    async def encode(self, prompt: str | tuple[Message, ...]) -> list[int]:
        """Ids of the whole prompt, nothing cut. Raises DataError; ServeError after `close`."""
        if self._closed:
            raise ServeError("the service is shutting down")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode, prompt)

    def close(self) -> None:
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, prompt: str | tuple[Message, ...]) -> list[int]:
        template = self._free.get_nowait()  # never empty: as many copies as threads
        try:
            return template.encode_prompt(_without_developers(prompt, template), _NO_LIMIT)
        finally:
            self._free.put(template)


def _without_developers(
    prompt: str | tuple[Message, ...], template: Template
) -> str | Sequence[Message]:
    """OpenAI's newer name for the system role, where the chat template does not know it."""
    if isinstance(prompt, str):
        return prompt
    chat_template = str(template.tokenizer.chat_template) if template.kind == "chat" else ""
    if "developer" in chat_template:
        return prompt
    return [replace(turn, role="system") if turn.role == "developer" else turn for turn in prompt]
