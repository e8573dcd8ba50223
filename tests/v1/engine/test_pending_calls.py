# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Who waits for an engine core that dies, or that is shut down, is told so."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
import zmq.asyncio

from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.core_client import (
    AsyncMPClient,
    BackgroundResources,
    MPClient,
    SyncMPClient,
)
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.pending_calls import ends_calls_after

ANSWERS = "inproc://answers"
SECONDS = 10


class Undecodable:
    """A decoder that no answer suits."""

    def decode(self, frames: Any) -> Any:
        raise ValueError("not an answer")


class Core:
    """The place of an engine core: a socket that a client reads its answers from."""

    def __init__(self, context: zmq.Context):
        self._context = context
        self._socket = context.socket(zmq.PUSH)
        self._socket.bind(ANSWERS)

    def connect(self, client: MPClient, context: zmq.Context) -> None:
        """Give a client what it needs to read, and no process to watch."""
        client.ctx = context
        client.resources = BackgroundResources(ctx=self._context)
        client.resources.output_socket = context.socket(zmq.PULL)
        client.resources.output_socket.connect(ANSWERS)
        client.decoder = Undecodable()
        client.encoder = SimpleNamespace(encode=lambda request: [b""])
        client.utility_results = {}
        client.core_engine, client.client_index = b"", 0

    def answer(self, message: bytes) -> None:
        self._socket.send(message)

    def die(self) -> None:
        """Say what a core says last."""
        self.answer(EngineCoreProc.ENGINE_CORE_DEAD)

    def close(self) -> None:
        self._socket.close(linger=0)


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def core(context) -> Iterator[Core]:
    core = Core(context)
    yield core
    core.close()


@contextmanager
def reading_async(core: Core, context: zmq.Context) -> Iterator[AsyncMPClient]:
    client = AsyncMPClient.__new__(AsyncMPClient)
    core.connect(client, zmq.asyncio.Context(context))
    client.outputs_queue = asyncio.Queue()
    client._ensure_output_queue_task()
    try:
        yield client
    finally:
        client.resources()


@pytest.fixture
def reading(core, context, monkeypatch) -> Iterator[SyncMPClient]:
    def connect(client: SyncMPClient, **_: Any) -> None:
        client.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_size=1)
        )
        core.connect(client, context)

    monkeypatch.setattr(MPClient, "__init__", connect)
    client = SyncMPClient(None, None, False)
    client.resources.input_socket = None
    yield client
    if client.output_queue_thread.is_alive():
        client.resources()
    client.output_queue_thread.join(SECONDS)


ENDS: dict[str, Callable[[Core, MPClient], None]] = {
    "the core dies": lambda core, client: core.die(),
    "an answer makes no sense": lambda core, client: core.answer(b"?"),
    "the client is shut down": lambda core, client: client.resources(),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_call_of_a_server_ends_with_its_reader(core, context, end):
    async def call() -> None:
        with reading_async(core, context) as client:
            await asyncio.sleep(0)  # the reader waits for its socket
            answer: asyncio.Future = asyncio.Future()
            client.utility_results[7] = answer
            ENDS[end](core, client)
            with pytest.raises(EngineDeadError):
                await asyncio.wait_for(answer, SECONDS)
            with pytest.raises(EngineDeadError):  # one that comes late
                await asyncio.wait_for(client.call_utility_async("late"), SECONDS)

    asyncio.run(call())


def test_a_call_ends_with_a_reader_that_never_began(core, context):
    async def call() -> None:
        with reading_async(core, context) as client:
            answer: asyncio.Future = asyncio.Future()
            client.utility_results[7] = answer
            client.resources()
            with pytest.raises(EngineDeadError):
                await asyncio.wait_for(answer, SECONDS)

    asyncio.run(call())


def test_a_reader_is_started_once(core, context):
    async def call() -> None:
        with reading_async(core, context) as client:
            reader = client.resources.output_queue_task
            client._ensure_output_queue_task()
            assert client.resources.output_queue_task is reader

    asyncio.run(call())


@pytest.mark.parametrize("end", ENDS)
def test_a_call_without_a_loop_ends_with_its_reader(core, reading, end):
    answer: Future = Future()
    reading.utility_results[7] = answer
    ENDS[end](core, reading)
    assert isinstance(answer.exception(SECONDS), EngineDeadError)
    with pytest.raises(EngineDeadError):
        reading.call_utility("late")


def ended(*answers: Any) -> None:
    """Have the reader of these answers end."""
    with ends_calls_after(SimpleNamespace(), dict(enumerate(answers))):
        pass


def test_a_call_that_was_answered_stays_so():
    answer: Future = Future()
    answer.set_result(7)
    ended(answer)
    assert answer.result(0) == 7


def test_a_call_whose_loop_is_gone_is_nobodys():
    async def made() -> asyncio.Future:
        return asyncio.get_running_loop().create_future()

    ended(asyncio.run(made()))
