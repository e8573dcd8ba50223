# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Streams that end otherwise than a server's do in `test_sync_metrics.py`."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from vllm.entrypoints.serve.weight_versions import names_weights_of_chat_stream

REQUEST = SimpleNamespace(return_token_ids=True)
# Before 0.32 there are no names of weights, and outputs cannot have any.
OUTPUT = SimpleNamespace(index=0, finish_reason="abort", weight_versions=None)


async def results() -> AsyncIterator[Any]:
    yield SimpleNamespace(outputs=[OUTPUT])


async def all_of(events: AsyncIterator[str]) -> list[str]:
    return [event async for event in events]


def test_an_error_in_the_place_of_an_end_is_passed_on():
    error = {"error": {"message": "ä", "code": 500}}

    @names_weights_of_chat_stream
    async def stream(serving, request, results):
        async for _ in results:
            yield f"data: {json.dumps(error)}\n\n"
        yield "data: [DONE]\n\n"

    first, last = asyncio.run(all_of(stream(None, REQUEST, results())))
    assert json.loads(first.removeprefix("data: ")) == error
    assert first.endswith("\n\n")
    assert last == "data: [DONE]\n\n"


def test_who_stops_listening_ends_the_stream():
    ended = []

    @names_weights_of_chat_stream
    async def stream(serving, request, results):
        try:
            while True:
                yield 'data: {"choices": []}\n\n'
        finally:
            ended.append(True)

    async def listen() -> None:
        events = stream(None, REQUEST, results())
        await anext(events)
        await events.aclose()
        assert ended

    asyncio.run(listen())
