# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What changes weights needs the API key: the routes of dev mode, and a few others.

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
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

__all__ = ["guards_routes"]

Authenticate = Callable[[Any, Scope, Receive, Send], Awaitable[None]]

# Each has a `router`. Their own routes are asked, not the application's: how it keeps
# what it includes is FastAPI's affair, and changes.
GUARDED_MODULES = (
    "vllm.entrypoints.rl.online.api_router",
    "vllm.entrypoints.serve.dev.cache.api_router",
    "vllm.entrypoints.serve.dev.rpc.api_router",
    "vllm.entrypoints.serve.dev.server_info.api_router",
    "vllm.entrypoints.serve.dev.sleep.api_router",
    # It moves experts between ranks, and ends an open sync.
    "vllm.entrypoints.serve.elastic_ep.api_router",
    # Before 0.32.
    "vllm.entrypoints.serve.cache.api_router",
    "vllm.entrypoints.serve.instrumentator.server_info",
    "vllm.entrypoints.serve.rlhf.api_router",
    "vllm.entrypoints.serve.rpc.api_router",
    "vllm.entrypoints.serve.sleep.api_router",
)


def _never_asked(request: Any) -> None:
    """Stand in for the endpoint of a route that is matched only."""


# Other paths to `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, for SageMaker. A
# library adds them to the application: they are in no module's router.
ADAPTERS = (
    Route("/adapters", _never_asked, methods=["POST"]),
    Route("/adapters/{adapter_name}", _never_asked, methods=["DELETE"]),
)


def guards_routes(authenticate: Authenticate) -> Authenticate:
    """Wrap `AuthenticationMiddleware.__call__`: guarded routes answer 401 without key.

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
    return any(route.matches(scope)[0] is not Match.NONE for route in _guarded())


def _guarded() -> Iterator[BaseRoute]:
    """Yield the guarded routes of this server, and of modules it has loaded."""
    yield from ADAPTERS
    for name in GUARDED_MODULES:
        if (module := sys.modules.get(name)) is not None:
            yield from module.router.routes
