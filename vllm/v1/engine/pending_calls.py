# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Calls to an engine core end with an error when nobody reads its answers any more.

The reader of answers ends when the engine core says that it dies, and when the client
is shut down. A call that is still open, such as that to the commit of a weight update,
would wait for ever, and with it the server, which ends after its open requests.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial

from vllm.v1.engine.exceptions import EngineDeadError

__all__ = ["answers_calls", "answers_calls_async"]

Answer = asyncio.Future | Future


@contextmanager
def answers_calls(calls: Mapping[int, Answer]) -> Iterator[None]:
    """Decorate the function that reads the answers to these calls until it ends.

    A call that it leaves without an answer ends with `EngineDeadError`.
    """
    try:
        yield
    finally:
        for answer in list(calls.values()):
            if isinstance(answer, asyncio.Future):
                with suppress(RuntimeError):  # its loop is closed: nobody waits
                    answer.get_loop().call_soon_threadsafe(partial(_end, answer))
            else:
                _end(answer)


@asynccontextmanager
async def answers_calls_async(calls: Mapping[int, Answer]) -> AsyncIterator[None]:
    """Decorate such a function that is a coroutine."""
    with answers_calls(calls):
        yield


def _end(answer: Answer) -> None:
    if not answer.done():
        answer.set_exception(EngineDeadError())
