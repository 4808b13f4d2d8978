"""Asking a running service with the official OpenAI client."""

from __future__ import annotations

import json

import openai


def client_of(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


def answered_digest(client: openai.OpenAI, user: str) -> str:
    """The digest of the prefix that answered the user; "base" for none."""
    (model,) = client.models.list().data
    raw = client.chat.completions.with_raw_response.create(
        model=model.id,
        messages=[{"role": "user", "content": "say it"}],
        user=user,
        max_tokens=4,
        temperature=0,
    )
    body = json.loads(raw.text)
    header = raw.headers["x-prefix-digest"]
    assert header == (body["prefix"]["digest"] if body["prefix"] else "base")
    return str(header)
