# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Calls of the client of several engine cores, which are stand-ins."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from vllm.v1.engine.core_client import DPLBAsyncMPClient
from vllm.v1.engine.replica_calls import takes_all_replicas_or_none
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


def test_what_cannot_be_prepared_nobody_has():
    client = Client("first", REFUSED)
    with pytest.raises(RpcRefusedError, match=r"Replicas \[1\] of 2 .* none takes it"):
        call(client, "prepare_weight_update")


class Replicas:
    """A client that notes what it is asked for.

    Args:
        fails: the RPC that a replica refuses.
        moe: whether the model is a mixture of experts.
        paused: whether somebody has paused generation.
        parallel: what differs from two replicas that this client has.
    """

    def __init__(self, fails="", moe=True, paused=False, **parallel):
        ways = dict(
            data_parallel_size=2,
            data_parallel_external_lb=False,
            data_parallel_hybrid_lb=False,
        )
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(**ways | parallel),
            model_config=SimpleNamespace(is_moe=moe),
        )
        self.calls: list[str] = []
        self._fails = fails
        self._paused = paused

    async def collective_rpc(self, rpc: str) -> None:
        self.calls.append(rpc.removesuffix("_weight_update"))
        if rpc.startswith(self._fails or " "):
            raise REFUSED

    async def is_paused(self) -> bool:
        return self._paused

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", False)
        self.calls.append("pause")

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    @takes_all_replicas_or_none
    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        await self.collective_rpc("finish_weight_update")


PREPARED = ["prepare", "finish"]


@pytest.mark.parametrize(
    ("replicas", "calls"),
    [
        (Replicas(), ["pause", *PREPARED, "resume"]),
        (Replicas(paused=True), PREPARED),
        (Replicas(moe=False), PREPARED),
        (Replicas(data_parallel_size=1), ["finish"]),
        (Replicas(data_parallel_external_lb=True), ["finish"]),
        (Replicas(data_parallel_hybrid_lb=True), ["finish"]),
    ],
    ids=["mixture", "paused", "dense", "one", "external", "hybrid"],
)
def test_replicas_prepare_before_one_finishes(replicas, calls):
    asyncio.run(replicas.finish_weight_update(weight_version="7"))
    assert replicas.calls == calls


@pytest.mark.parametrize(
    ("rpc", "calls"),
    [
        ("prepare", ["pause", "prepare", "abort", "resume"]),
        ("finish", ["pause", "prepare", "finish", "resume"]),
    ],
)
def test_what_a_replica_refuses_ends_for_all(rpc, calls):
    replicas = Replicas(fails=rpc)
    with pytest.raises(RpcRefusedError, match="w2 was never sent"):
        asyncio.run(replicas.finish_weight_update())
    assert replicas.calls == calls
