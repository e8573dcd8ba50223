# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Completions say which weights produced their tokens.

Beside `token_ids`, for requests with `return_token_ids`:

    "weight_versions": [{"version": "step-7", "start": 0, "end": 12},
                        {"version": "step-8", "start": 12, "end": 80}]

"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import wraps
from typing import Any

from vllm.outputs import RequestOutput

__all__ = ["names_weights_of_chat", "names_weights_of_completion"]

Results = AsyncIterator[RequestOutput]


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


def _name_weights(response: Any, request: Any, results: Iterable[RequestOutput]) -> Any:
    if request.return_token_ids and hasattr(response, "choices"):
        outputs = (output for result in results for output in result.outputs)
        for choice, output in zip(response.choices, outputs, strict=True):
            # A choice takes fields that its model does not know.
            choice.weight_versions = output.weight_versions
    return response
