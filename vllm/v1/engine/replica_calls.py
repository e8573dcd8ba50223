# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A weight update of several replicas: all of them take it, or none.

Ranks of an engine vote in its RPCs. Replicas cannot: each is an engine of its own, and
one that waits for the vote of another may be waited for in that one's step. So the
client of all of them asks first whether each would finish, and then has them do it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar, cast

from vllm.logger import init_logger
from vllm.v1.engine.rpc_refusal import RpcRefusedError
from vllm.v1.engine.weight_fence import WRITING_RPCS

__all__ = ["takes_all_replicas_or_none", "tells_of_replicas"]

logger = init_logger(__name__)

Call = TypeVar("Call", bound=Callable[..., Coroutine[Any, Any, Any]])

PREPARE = "prepare_weight_update"

NONE = "Replicas {failed} of {count} refused the weight update, so that none takes it"

DIFFER = (
    "Replicas {failed} of {count} failed in {rpc}, and the others have done it. They "
    "may serve different weights, or hold the weight update open: ask for "
    "abort_weight_update, and sync again"
)


def takes_all_replicas_or_none(finish: Call) -> Call:
    """Wrap the call by which a client of all replicas finishes a weight update.

    Replicas of a mixture of experts run each other's experts. None of them is in a step
    while some have new weights and others do not.
    """

    @wraps(finish)
    async def finish_all(client: Any, *args: Any, **kwargs: Any) -> Any:
        if not _has_all_replicas(client.vllm_config.parallel_config):
            return await finish(client, *args, **kwargs)
        async with _between_steps(client):
            try:
                await client.collective_rpc(PREPARE)
            except Exception:
                # What the others have prepared must not be finished.
                await client.collective_rpc("abort_weight_update")
                raise
            return await finish(client, *args, **kwargs)

    return cast(Call, finish_all)


def _has_all_replicas(parallel: Any) -> bool:
    """Whether there are several, and a client has all of them, not only its own."""
    local = parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb
    return parallel.data_parallel_size > 1 and not local


@asynccontextmanager
async def _between_steps(client: Any) -> AsyncIterator[None]:
    if not client.vllm_config.model_config.is_moe or await client.is_paused():
        yield
        return
    await client.pause_generation(mode="keep", clear_cache=False)
    try:
        yield
    finally:
        await client.resume_generation()


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

    return cast(Call, told)


def _error_of(rpc: str, errors: dict[int, Exception], count: int) -> Exception:
    """Return the first error that is no fault of the client, or else the first one."""
    faults = (e for e in errors.values() if not isinstance(e, RpcRefusedError))
    error = next(faults, next(iter(errors.values())))
    if len(errors) == count:
        return error
    told = NONE if rpc == PREPARE else DIFFER
    differ = told.format(failed=[*errors], count=count, rpc=rpc)
    logger.error("%s.", differ)
    if not isinstance(error, RpcRefusedError):
        return error
    message = f"{differ}: {error.refusal.message}"
    return RpcRefusedError(replace(error.refusal, message=message))
