# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the answer to a finished weight update says of what was updated."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from fastapi.responses import JSONResponse

from vllm.entrypoints.serve.reach_body import tells_reach


def answer_after(reaches: list) -> dict:
    """Finish an update of which the workers tell this."""

    async def rpc(method: str) -> list:
        assert method == "weight_update_reach"
        return reaches

    async def finish(raw_request) -> JSONResponse:
        return JSONResponse({"message": "finished"})

    state = SimpleNamespace(engine_client=SimpleNamespace(collective_rpc=rpc))
    request = SimpleNamespace(app=SimpleNamespace(state=state))
    answer = asyncio.run(tells_reach(finish)(raw_request=request))
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
