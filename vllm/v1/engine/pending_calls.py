# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Calls to an engine core that is shut down end with an error.

Who shuts an engine down does not wait for it to answer, and a server waits for its open
requests before it ends. One that awaits an answer, such as that to the commit of a
weight update, would keep it for ever.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec

from vllm.v1.engine.exceptions import EngineDeadError

__all__ = ["ends_pending_calls"]

P = ParamSpec("P")
Shutdown = Callable[Concatenate[Any, P], None]


def ends_pending_calls(shutdown: Shutdown[P]) -> Shutdown[P]:
    """Wrap the shutdown of a client of engine cores, which any thread may call."""

    @wraps(shutdown)
    def ending(client: Any, *args: P.args, **kwargs: P.kwargs) -> None:
        shutdown(client, *args, **kwargs)
        for future in list(client.utility_results.values()):
            if isinstance(future, asyncio.Future):
                with suppress(RuntimeError):  # its loop is closed: nobody waits
                    future.get_loop().call_soon_threadsafe(partial(_end, future))
            else:
                _end(future)

    return ending


def _end(future: asyncio.Future | Future) -> None:
    if not future.done():
        future.set_exception(EngineDeadError())
