# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A route that drops an open weight update: `POST /abort_weight_update`.

To finish the update of a trainer that died is no way to end it: what was sent may be
whole layers, which a sync is free to leave it at, and they would serve beside old ones.
"""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

__all__ = ["add_abort_route"]


def add_abort_route(router: APIRouter) -> None:
    """Add the route to the others that update weights."""

    @router.post("/abort_weight_update")
    async def abort_weight_update(raw_request: Request) -> JSONResponse:
        """Drop the open weight update, if there is one."""
        await raw_request.app.state.engine_client.collective_rpc("abort_weight_update")
        return JSONResponse({"message": "Weight update aborted"})
