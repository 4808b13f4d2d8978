"""Fields of OpenAI's API that this service does not implement, and their neutral values.

There is one table for each type of object. Null is accepted for any field. A field in the table may
have one of its neutral values, which do not change the answer. With any other value the answer
would look right but be wrong, so it is refused by name, as are unknown fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

from serve.events import Refused


class Anything:
    """Every value is neutral: the field affects only billing, caching or logging."""


ANYTHING = Anything()
Neutral = Anything | tuple[object, ...]
Table = Mapping[str, Neutral]

_BOTH: Table = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "metadata": ANYTHING,
    # Of other engines' clients.
    "best_of": (1,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "length_penalty": (1,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_special_tokens": (True,),
    "bad_words": ([],),
    "logits_processors": ([],),
    "priority": ANYTHING,
    "cache_salt": ANYTHING,
    "request_id": ANYTHING,
}

COMPLETION: Table = {
    **_BOTH,
    "echo": (False,),
    "logprobs": (),
    "suffix": ("",),
}

CHAT: Table = {
    **_BOTH,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": ANYTHING,
    "prompt_cache_key": ANYTHING,
    "prompt_cache_options": ANYTHING,
    "prompt_cache_retention": ANYTHING,
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": ANYTHING,
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # Of other engines' clients.
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "include_reasoning": (False,),
    "thinking": ({"type": "disabled"},),
}

MESSAGE: Table = {
    "annotations": ([],),
    "audio": (),
    "cache_control": ANYTHING,
    "function_call": (),
    "id": ANYTHING,
    "reasoning": ("",),
    "reasoning_content": ("",),
    "refusal": ("",),
    "tool_calls": ([],),
    "tool_call_id": ANYTHING,
}

PART: Table = {"annotations": ([],), "cache_control": ANYTHING, "prompt_cache_breakpoint": ANYTHING}

STREAM_OPTIONS: Table = {"include_obfuscation": (True, False), "continuous_usage_stats": (False,)}

# Hints that are added to a refusal.
_HINTS: Mapping[str, str] = {
    "tools": "this service does not call tools",
    "functions": "this service does not call functions",
    "tool_calls": "this service does not call tools: write calls as content, or omit them",
    "function_call": "this service does not call functions",
    "n": "send several requests with different seeds",
}


def drop_neutral(
    body: Mapping[str, Any], table: Table, implemented: Set[str], where: str = ""
) -> dict[str, Any]:
    """The implemented fields of an object; all others must be neutral and are dropped.

    `where` is the object's path in the body, such as `"messages.1."`. Raises Refused (400) with the
    name of the first field that is unknown or has an unsupported value.
    """
    kept = {}
    for name, value in body.items():
        if name in implemented:
            kept[name] = value
        elif value is not None:
            _check(name, value, table, where)
    return kept


def _check(name: str, value: object, table: Table, where: str) -> None:
    path = f"{where}{name}"[:200]
    if name not in table:
        raise Refused(
            f"{path}: no such field here", status=400, code="unsupported_parameter", param=path
        )
    neutral = table[name]
    if isinstance(neutral, Anything) or any(_equal(value, allowed) for allowed in neutral):
        return
    allowed = " or ".join(["null", *map(json.dumps, neutral)])
    hint = f"; {_HINTS[name]}" if name in _HINTS else ""
    raise Refused(
        f"{path}: only {allowed} is supported{hint}",
        status=400,
        code="unsupported_value",
        param=path,
    )


def _equal(value: object, neutral: object) -> bool:
    """Equal as JSON values: true differs from 1, but 0 equals 0.0."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
