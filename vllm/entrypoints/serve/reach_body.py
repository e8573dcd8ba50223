# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the answer to the finish of a weight update says of a part of the model.

{"message": "Weight update finished", "updated": 12, "kept": 31,
 "kept_parameters": ["model.embed_tokens.weight", ...]}

A parameter is kept if it is on any rank. At most 20 are listed.
"""

import json
from collections.abc import Awaitable, Callable, Iterable
from functools import wraps
from typing import Any

from fastapi.responses import JSONResponse

__all__ = ["tells_reach"]

MAX_LISTED = 20
Route = Callable[..., Awaitable[JSONResponse]]


def tells_reach(finish: Route) -> Route:
    """Wrap the route that finishes a weight update: its answer says how far it went."""

    @wraps(finish)
    async def telling(**arguments: Any) -> JSONResponse:
        answer = await finish(**arguments)
        client = arguments["raw_request"].app.state.engine_client
        reaches = await client.collective_rpc("weight_update_reach")
        return JSONResponse({**json.loads(bytes(answer.body)), **_summary(reaches)})

    return telling


def _summary(reaches: Iterable[dict[str, list[str]] | None]) -> dict[str, Any]:
    known = [reach for reach in reaches if reach is not None]
    if not known:  # an update of another kind, such as one in kernel format
        return {}
    kept = dict.fromkeys(name for reach in known for name in reach["kept"])
    updated = {name for reach in known for name in reach["updated"]} - kept.keys()
    listed = list(kept)[:MAX_LISTED]
    return {"updated": len(updated), "kept": len(kept), "kept_parameters": listed}
