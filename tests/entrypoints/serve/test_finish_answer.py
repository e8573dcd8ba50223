# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the answer to a finished weight update says of it."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from fastapi.responses import JSONResponse

from vllm.entrypoints.serve.finish_answer import tells_of_the_sync


def answer_after(reaches: list, ended: dict | None = None) -> dict:
    """Finish an update of which the workers tell this, and the engine core that."""

    last_call = "finish_weight_update"

    async def rpc(method: str) -> list:
        nonlocal last_call
        assert method == "weight_update_reach"
        last_call = method
        return reaches

    async def last() -> dict | None:
        return ended if last_call == "finish_weight_update" else None

    async def finish(raw_request) -> JSONResponse:
        return JSONResponse({"message": "finished"})

    client = SimpleNamespace(collective_rpc=rpc, last_weight_sync=last)
    state = SimpleNamespace(engine_client=client)
    request = SimpleNamespace(app=SimpleNamespace(state=state))
    answer: JSONResponse = asyncio.run(tells_of_the_sync(finish)(raw_request=request))
    return json.loads(answer.body)


def test_parameters_are_counted_once_for_all_ranks():
    rank = {"updated": ["a", "b"], "kept": ["c"]}
    assert answer_after([rank, rank]) == {
        "message": "finished",
        "updated": 2,
        "kept": 1,
        "kept_parameters": ["c"],
    }


def test_what_one_rank_kept_is_kept():
    one, other = {"updated": ["a"], "kept": []}, {"updated": [], "kept": ["a"]}
    told = answer_after([one, other])
    assert (told["updated"], told["kept_parameters"]) == (0, ["a"])


def test_at_most_twenty_are_listed():
    kept = [f"p{n}" for n in range(30)]
    told = answer_after([{"updated": [], "kept": kept}])
    assert (told["kept"], told["kept_parameters"]) == (30, kept[:20])


@pytest.mark.parametrize("reaches", [[], [None, None]])
def test_of_other_kinds_of_updates_nothing_is_told(reaches):
    assert answer_after(reaches) == {"message": "finished"}


def test_the_sync_that_ended_is_told():
    ended = {"version": 3, "pause_seconds": 0.02}
    assert answer_after([None], ended) == {"message": "finished", "sync": ended}
