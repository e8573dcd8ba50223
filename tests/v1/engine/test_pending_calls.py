# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Who waits for an engine core that is shut down is told so."""

import asyncio
from concurrent.futures import Future

import pytest

from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.pending_calls import ends_pending_calls


class Client:
    """Waits for these."""

    def __init__(self, *futures):
        self.utility_results = dict(enumerate(futures))
        self.timeout: float | None = None

    @ends_pending_calls
    def shutdown(self, timeout: float | None = None) -> None:
        self.timeout = timeout


def test_a_call_of_another_thread_ends():
    async def wait() -> None:
        future = asyncio.get_running_loop().create_future()
        await asyncio.to_thread(Client(future).shutdown, timeout=0)
        await asyncio.wait_for(future, 10)

    with pytest.raises(EngineDeadError):
        asyncio.run(wait())


def test_a_call_without_a_loop_ends():
    future: Future = Future()
    client = Client(future)
    client.shutdown(timeout=3)
    assert client.timeout == 3
    with pytest.raises(EngineDeadError):
        future.result(0)


def test_a_call_that_was_answered_stays_so():
    future: Future = Future()
    future.set_result(7)
    Client(future).shutdown()
    assert future.result(0) == 7


def test_a_call_whose_loop_is_gone_is_nobodys():
    async def made() -> asyncio.Future:
        return asyncio.get_running_loop().create_future()

    Client(asyncio.run(made())).shutdown()
