# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a trainer is told when its weight update is finished.

{"message": "Weight update finished",
 "updated": 12, "kept": 31, "kept_parameters": ["model.embed_tokens.weight", ...],
 "sync": {"version": 3, "pause_seconds": 0.02, ...}}

A parameter is kept if it is on any rank. At most 20 are listed.
"""

import json
from collections.abc import Awaitable, Callable, Iterable
from functools import wraps
from typing import Any

from fastapi.responses import JSONResponse

__all__ = ["tells_of_the_sync"]

MAX_LISTED = 20
Finish = Callable[..., Awaitable[JSONResponse]]


def tells_of_the_sync(finish: Finish) -> Finish:
    """Wrap `POST /finish_weight_update`: its answer says how far the update went.

    "sync" has the fields of `EndedSync`.
    """

    @wraps(finish)
    async def telling(**arguments: Any) -> JSONResponse:
        answer = await finish(**arguments)
        client = arguments["raw_request"].app.state.engine_client
        # First, because it is the one that the last call of the workers has ended.
        sync = await client.last_weight_sync()
        told = _reach(await client.collective_rpc("weight_update_reach"))
        if sync is not None:  # else the transfer engine makes no report
            told["sync"] = sync
        return JSONResponse({**json.loads(bytes(answer.body)), **told})

    return telling


def _reach(reaches: Iterable[dict[str, list[str]] | None]) -> dict[str, Any]:
    known = [reach for reach in reaches if reach is not None]
    if not known:  # an update of another kind, such as one in kernel format
        return {}
    kept = dict.fromkeys(name for reach in known for name in reach["kept"])
    updated = {name for reach in known for name in reach["updated"]} - kept.keys()
    listed = list(kept)[:MAX_LISTED]
    return {"updated": len(updated), "kept": len(kept), "kept_parameters": listed}
