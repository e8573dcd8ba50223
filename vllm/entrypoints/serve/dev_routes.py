# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The routes of dev mode need the API key.

The server asks for its key by the path, `/v1` and such. Who changes weights, pauses the
engine or calls its workers is on none of these paths. Here a request is matched with
the routes as the router will match it, and what it would reach decides: neither a root
path nor a slash more or less makes a way round. All other routes stay as they are, so
`/health`, `/metrics`, `/ping` and `/version` need no key.
"""

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

__all__ = ["guards_dev_routes", "is_dev_route"]

Authenticate = Callable[[Any, Scope, Receive, Send], Awaitable[None]]

# What a server has only with VLLM_SERVER_DEV_MODE=1.
DEV_PACKAGES = (
    "vllm.entrypoints.rl",
    "vllm.entrypoints.serve.dev",
    # Before 0.32.
    "vllm.entrypoints.serve.cache",
    "vllm.entrypoints.serve.instrumentator.server_info",
    "vllm.entrypoints.serve.rlhf",
    "vllm.entrypoints.serve.rpc",
    "vllm.entrypoints.serve.sleep",
)


def guards_dev_routes(authenticate: Authenticate) -> Authenticate:
    """Wrap `AuthenticationMiddleware.__call__`: dev routes answer 401 without the key.

    OPTIONS passes, as it does on the other routes.
    """

    @wraps(authenticate)
    def guarded(
        middleware: Any, scope: Scope, receive: Receive, send: Send
    ) -> Awaitable[None]:
        if _needs_key(scope) and not middleware.verify_token(Headers(scope=scope)):
            refusal = JSONResponse({"error": "Unauthorized"}, status_code=401)
            return refusal(scope, receive, send)
        return authenticate(middleware, scope, receive, send)

    return guarded


def is_dev_route(route: BaseRoute) -> bool:
    """Whether a server has this route in dev mode only."""
    module = getattr(getattr(route, "endpoint", None), "__module__", "")
    return any(f"{module}.".startswith(f"{package}.") for package in DEV_PACKAGES)


def _needs_key(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] == "OPTIONS":
        return False
    routes = filter(is_dev_route, scope["app"].routes)
    return any(route.matches(scope)[0] is not Match.NONE for route in routes)
