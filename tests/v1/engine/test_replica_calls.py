# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Calls of the client of several engine cores, which are stand-ins."""

import asyncio
from typing import Any

import pytest

from vllm.v1.engine.core_client import DPLBAsyncMPClient
from vllm.v1.engine.rpc_refusal import RpcRefusal, RpcRefusedError

REFUSED = RpcRefusedError(RpcRefusal("w2 was never sent", 422, [{"expert": 3}], [], 0))


class Client(DPLBAsyncMPClient):
    """Its engine cores answer with what they are; the first one takes its time."""

    def __init__(self, *answers: Any):
        self.core_engines = [str(n).encode() for n in range(len(answers))]
        self.answers = dict(zip(self.core_engines, answers, strict=True))
        self.answered: list[bytes] = []

    async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> Any:
        if engine == self.core_engines[0]:
            await asyncio.sleep(0.01)
        self.answered.append(engine)
        if isinstance(answer := self.answers[engine], Exception):
            raise answer
        return answer

    def __del__(self) -> None:
        """There is nothing to shut down."""


def call(client: Client, rpc: str = "finish_weight_update") -> Any:
    return asyncio.run(client.call_utility_async("collective_rpc", rpc, None, (), {}))


def test_the_first_replica_answers():
    assert call(Client("first", "second")) == "first"


def test_a_replica_that_refuses_is_named_when_all_have_answered():
    client = Client("first", REFUSED, "third")
    with pytest.raises(RpcRefusedError, match=r"\[1\] of 3 failed in finish_.*") as got:
        call(client)
    assert len(client.answered) == 3
    assert "abort_weight_update" in str(got.value)
    assert "w2 was never sent" in str(got.value)
    assert (got.value.http_status, got.value.refusal.missing) == (422, [{"expert": 3}])


def test_where_all_refuse_they_are_alike():
    with pytest.raises(RpcRefusedError, match="^w2 was never sent$"):
        call(Client(REFUSED, REFUSED))


def test_what_is_no_fault_of_the_client_comes_first():
    with pytest.raises(RuntimeError, match="the disk is gone"):
        call(Client(REFUSED, RuntimeError("the disk is gone")))


def test_other_calls_are_as_they_were():
    with pytest.raises(RpcRefusedError, match="^w2 was never sent$"):
        call(Client("first", REFUSED), "weight_status")
