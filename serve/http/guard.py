"""Protects a service that trusts every local caller from web pages.

A page in a browser can reach loopback in two ways: by a foreign name that resolves to 127.0.0.1
(DNS rebinding), which the Host header reveals, and by a simple POST, which the Origin header
reveals. Programs on this machine send neither.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.config import ServeConfig
from serve.events import Problem
from serve.http.answers import problem_response

_NAMES = ("localhost", "127.0.0.1", "[::1]")


def find_foreign(
    hosts: Sequence[str], origins: Sequence[str], config: ServeConfig
) -> tuple[str, str] | None:
    """The header that reveals a foreign page, and its expected value; None if there is none.

    `hosts` and `origins` are all values of these headers; a request without a Host, or with two, is
    refused. The host's port must be the service's; with `config.port` 0, any port is accepted.

    >>> find_foreign(["evil.example"], [], ServeConfig(port=8000))
    ('host', 'localhost:8000, 127.0.0.1:8000 or [::1]:8000')
    """
    names = list(dict.fromkeys((*_NAMES, _bracket(config.host))))
    if len(hosts) != 1 or not _is_local(hosts[0].lower(), names, config.port):
        port = f":{config.port}" if config.port else ""
        *first, last = [name + port for name in names]
        return "host", f"{', '.join(first)} or {last}"
    for origin in origins:
        scheme, _, rest = origin.lower().partition("://")
        local = scheme in ("http", "https") and _is_local(rest, names, config.port)
        if not local and origin not in config.cors_origins:
            return "origin", "an origin that serve.cors_origins names"
    return None


def _is_local(host: str, names: Collection[str], port: int) -> bool:
    """Whether `host` is `name:port` for one of `names`; port 80 may be omitted."""
    name, colon, number = host.rpartition(":")
    if not colon or host.endswith("]"):
        name, number = host, "80"
    return name in names and (port == 0 or number == str(port))


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class LocalOnly:
    """ASGI middleware: 403 for requests that come from a foreign web page."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app, self.config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            found = find_foreign(headers.getlist("host"), headers.getlist("origin"), self.config)
            if found is not None:
                name, expected = found
                problem = Problem(
                    status=403,
                    message=f"the request's {name} header is foreign; expected {expected}",
                    code="foreign_page",
                )
                await problem_response(problem)(scope, receive, send)
                return
        await self.app(scope, receive, send)
