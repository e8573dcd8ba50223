# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a trainer is told when its weight update is finished.

{"message": ..., "sync": {"version": 3, "pause_seconds": 0.02, ...}}
"""

import json
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

__all__ = ["tells_of_the_sync"]

Finish = Callable[..., Awaitable[JSONResponse]]


def tells_of_the_sync(finish: Finish) -> Finish:
    """Wrap `POST /finish_weight_update`: its body has the fields of `EndedSync`."""

    @wraps(finish)
    async def telling(raw_request: Request, *args: Any, **kwargs: Any) -> JSONResponse:
        answer = await finish(raw_request, *args, **kwargs)
        sync = await raw_request.app.state.engine_client.last_weight_sync()
        if sync is None:  # the transfer engine makes no report
            return answer
        return JSONResponse({**json.loads(bytes(answer.body)), "sync": sync})

    return telling
