# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Routes that read their body themselves, and take it for an object.

Before 0.32 those that update weights do; since then FastAPI checks what they declare.
"""

from collections.abc import Awaitable, Callable
from functools import wraps
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException, Request

__all__ = ["takes_an_object"]

Route = Callable[[Request], Awaitable[Any]]


def takes_an_object(route: Route) -> Route:
    """Wrap a route: it answers 400 where its body is something else."""

    @wraps(route)
    async def checked(raw_request: Request) -> Any:
        try:
            body = await raw_request.json()  # which the request keeps
        except ValueError as error:
            raise _refusal(f"what is no JSON ({error})") from error
        if not isinstance(body, dict):
            raise _refusal(f"{body!r:.80}")
        return await route(raw_request)

    return checked


def _refusal(got: str) -> HTTPException:
    detail = f"expected an object in JSON as the body, got {got}"
    return HTTPException(HTTPStatus.BAD_REQUEST, detail)
