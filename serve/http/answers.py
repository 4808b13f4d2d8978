"""Errors as HTTP responses in OpenAI's format."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from serve.events import Problem


def problem_response(problem: Problem) -> Response:
    headers = {"retry-after": "1"} if problem.status in (429, 503) else {}
    if problem.status == 408:
        headers = {"connection": "close"}  # the rest of the body may still arrive
    return JSONResponse(problem.body(), status_code=problem.status, headers=headers)
