# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Completions say which weights produced their tokens.

Beside `token_ids`, for requests with `return_token_ids`:

    "weight_versions": [{"version": "step-7", "start": 0, "end": 12},
                        {"version": "step-8", "start": 12, "end": 80}]

In a stream it is in the chunk that finishes a choice, for all tokens of the choice.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import asdict
from functools import wraps
from typing import Any

from vllm.outputs import RequestOutput

__all__ = [
    "names_weights_of_chat",
    "names_weights_of_chat_stream",
    "names_weights_of_completion",
    "names_weights_of_completion_stream",
]

Results = AsyncIterator[RequestOutput]
Events = AsyncGenerator[str, None]
# What is to be said of each choice that has finished.
Spans = dict[int, list[dict[str, Any]] | None]

EVENT, DONE = "data: ", "data: [DONE]"


def names_weights_of_completion(respond: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap how a completion's response is made of the results of its prompts."""

    @wraps(respond)
    def naming(
        serving: Any,
        results: list[RequestOutput],
        request: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        response = respond(serving, results, request, *args, **kwargs)
        return _name_weights(response, request, results)

    return naming


def names_weights_of_chat(
    respond: Callable[..., Awaitable[Any]],
) -> Callable[..., Awaitable[Any]]:
    """Wrap how a chat's response is made of its last result."""

    @wraps(respond)
    async def naming(
        serving: Any, request: Any, results: Results, *args: Any, **kwargs: Any
    ) -> Any:
        last: list[RequestOutput] = []

        async def noted() -> Results:
            async for result in results:
                last[:] = [result]
                yield result

        response = await respond(serving, request, noted(), *args, **kwargs)
        return _name_weights(response, request, last)

    return naming


def names_weights_of_completion_stream(stream: Callable[..., Events]) -> Any:
    """Wrap how a completion is streamed while the results of its prompts come."""

    @wraps(stream)
    def naming(
        serving: Any,
        request: Any,
        inputs: Any,
        results: AsyncIterator[tuple[int, RequestOutput]],
        *args: Any,
        **kwargs: Any,
    ) -> Events:
        if not request.return_token_ids:
            return stream(serving, request, inputs, results, *args, **kwargs)
        finished: Spans = {}

        async def noted() -> AsyncIterator[tuple[int, RequestOutput]]:
            async for prompt, result in results:
                _note(result, finished, first=prompt * (request.n or 1))
                yield prompt, result

        events = stream(serving, request, inputs, noted(), *args, **kwargs)
        return _name_streamed(events, finished)

    return naming


def names_weights_of_chat_stream(stream: Callable[..., Events]) -> Any:
    """Wrap how a chat is streamed while its results come."""

    @wraps(stream)
    def naming(
        serving: Any, request: Any, results: Results, *args: Any, **kwargs: Any
    ) -> Events:
        if not request.return_token_ids:
            return stream(serving, request, results, *args, **kwargs)
        finished: Spans = {}

        async def noted() -> Results:
            async for result in results:
                _note(result, finished)
                yield result

        events = stream(serving, request, noted(), *args, **kwargs)
        return _name_streamed(events, finished)

    return naming


def _name_weights(response: Any, request: Any, results: Iterable[RequestOutput]) -> Any:
    if request.return_token_ids and hasattr(response, "choices"):
        outputs = (output for result in results for output in result.outputs)
        for choice, output in zip(response.choices, outputs, strict=True):
            # A choice takes fields that its model does not know.
            choice.weight_versions = output.weight_versions
    return response


def _note(result: RequestOutput, finished: Spans, first: int = 0) -> None:
    """Note the weights of the choices that a result finishes.

    Args:
        result: what came of a prompt since the last one.
        finished: takes the notes.
        first: index of the first choice of that prompt.

    """
    for output in result.outputs:
        if output.finish_reason is not None:
            spans = output.weight_versions
            named = None if spans is None else [asdict(span) for span in spans]
            finished[first + output.index] = named


async def _name_streamed(events: Events, finished: Spans) -> Events:
    async with aclosing(events):
        async for event in events:
            yield _name_in(event, finished) if finished else event


def _name_in(event: str, finished: Spans) -> str:
    """Name the weights in an event, if it finishes a choice."""
    if event.startswith(DONE):
        return event
    chunk = json.loads(event.removeprefix(EVENT))
    for choice in chunk.get("choices", ()):
        if choice.get("finish_reason") is not None and choice["index"] in finished:
            choice["weight_versions"] = finished.pop(choice["index"])
    text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
    return f"{EVENT}{text}\n\n"
