# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An engine that refuses all requests says so when its health is asked for."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import wraps
from typing import Any

__all__ = ["asks_for_weights"]

CheckHealth = Callable[[Any], Coroutine[Any, Any, None]]

# Below the second that probes wait by default.
PATIENCE_SECONDS = 0.5


def asks_for_weights(check_health: CheckHealth) -> CheckHealth:
    """Wrap an engine client's `check_health`: it raises while requests are refused.

    An engine core that loads a chunk or runs a long step does not answer at once. It is
    no less healthy for that, so nobody waits for it.
    """

    @wraps(check_health)
    async def checked(engine: Any) -> None:
        await check_health(engine)
        asked = engine.engine_core.call_utility_async("check_weights")
        with suppress(TimeoutError):
            await asyncio.wait_for(asked, PATIENCE_SECONDS)

    return checked
