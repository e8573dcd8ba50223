# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The routes of dev mode need the API key.

The server asks for its key by the path, `/v1` and such. Who changes weights, pauses the
engine or calls its workers is on none of these paths. Here a request is matched with
the routes as the router will match it, and what it would reach decides: neither a root
path nor a slash more or less makes a way round. All other routes stay as they are, so
`/health`, `/metrics`, `/ping` and `/version` need no key.
"""

import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import wraps
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

__all__ = ["guards_dev_routes"]

Authenticate = Callable[[Any, Scope, Receive, Send], Awaitable[None]]

# Each has a `router`. Their own routes are asked, not the application's: how it keeps
# what it includes is FastAPI's affair, and changes.
DEV_MODULES = (
    "vllm.entrypoints.rl.online.api_router",
    "vllm.entrypoints.serve.dev.cache.api_router",
    "vllm.entrypoints.serve.dev.rpc.api_router",
    "vllm.entrypoints.serve.dev.server_info.api_router",
    "vllm.entrypoints.serve.dev.sleep.api_router",
    # Before 0.32.
    "vllm.entrypoints.serve.cache.api_router",
    "vllm.entrypoints.serve.instrumentator.server_info",
    "vllm.entrypoints.serve.rlhf.api_router",
    "vllm.entrypoints.serve.rpc.api_router",
    "vllm.entrypoints.serve.sleep.api_router",
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


def _needs_key(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] == "OPTIONS":
        return False
    return any(route.matches(scope)[0] is not Match.NONE for route in _dev_routes())


def _dev_routes() -> Iterator[BaseRoute]:
    """Yield the routes of the modules that this server has loaded."""
    for name in DEV_MODULES:
        if (module := sys.modules.get(name)) is not None:
            yield from module.router.routes
