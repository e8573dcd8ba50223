# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A weight update that only some of the replicas take.

Ranks of an engine vote, replicas do not: each is an engine of its own, and may be in a
step while another one commits. Who asks must at least learn that they differ.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from vllm.logger import init_logger
from vllm.v1.engine.rpc_refusal import RpcRefusedError
from vllm.v1.engine.weight_fence import WRITING_RPCS

__all__ = ["tells_of_replicas"]

logger = init_logger(__name__)

Call = Callable[..., Awaitable[Any]]

DIFFER = (
    "Replicas {failed} of {count} failed in {rpc}, and the others have done it. They "
    "may serve different weights, or hold the weight update open: ask for "
    "abort_weight_update, and sync again"
)


def tells_of_replicas(call: Call) -> Call:
    """Wrap a call to the engine cores of all replicas.

    One that writes to weights is waited for everywhere, also where one replica has
    failed, and the error says which have.
    """

    @wraps(call)
    async def told(client: Any, method: str, *args: Any) -> Any:
        if method != "collective_rpc" or args[0] not in WRITING_RPCS:
            return await call(client, method, *args)
        calls = (
            client._call_utility_async(method, *args, engine=engine)
            for engine in client.core_engines
        )
        results = await asyncio.gather(*calls, return_exceptions=True)
        errors = {n: r for n, r in enumerate(results) if isinstance(r, Exception)}
        if errors:
            raise _error_of(args[0], errors, len(results))
        return results[0]

    return told


def _error_of(rpc: str, errors: dict[int, Exception], count: int) -> Exception:
    """Return the first error that is no fault of the client, or else the first one."""
    faults = (e for e in errors.values() if not isinstance(e, RpcRefusedError))
    error = next(faults, next(iter(errors.values())))
    if len(errors) == count:
        return error
    differ = DIFFER.format(failed=[*errors], count=count, rpc=rpc)
    logger.error("%s.", differ)
    if not isinstance(error, RpcRefusedError):
        return error
    message = f"{differ}: {error.refusal.message}"
    return RpcRefusedError(replace(error.refusal, message=message))
