"""An mkdocs hook that generates the configuration page from the settings' descriptions.

A setting is described once, where its component declares it. `--help` and this page read that
description, so neither can be outdated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.config import RunConfig, known_keys
from ptuning.methods.catalogue import METHODS

PAGE = "configuration.md"
MARK = "<!-- settings -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the settings. mkdocs calls this for every page."""
    return markdown.replace(MARK, render_reference()) if page.file.src_uri == PAGE else markdown


def render_reference() -> str:
    """Every section's settings as tables of name, default and description."""
    return "\n".join(_render_lines())


def _render_lines() -> Iterator[str]:
    for section in RunConfig.model_fields:
        if section == "method":
            for name, kind in METHODS.items():
                yield from _render_table(
                    f"method (type: {name})", list(known_keys(kind, "method."))
                )
        else:
            keys = [(key, field) for key, field in known_keys() if key.startswith(f"{section}.")]
            yield from _render_table(section, keys)


def _render_table(title: str, keys: list[tuple[str, Any]]) -> Iterator[str]:
    yield f"## {title}"
    yield ""
    yield "| setting | default | |"
    yield "| --- | --- | --- |"
    for key, field in keys:
        default = field.get_default(call_default_factory=True)
        shown = "none" if default is None else str(default)
        description = (field.description or "").replace("|", "\\|").replace("{", "&#123;")
        yield f"| `{key}` | `{shown}` | {description} |"
    yield ""
