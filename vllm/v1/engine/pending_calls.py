# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Calls to an engine core end with an error when nobody reads its answers any more.

The reader of answers ends when the engine core says that it dies, when an answer makes
no sense, and when the client is shut down. A call that is still open, such as that to
the commit of a weight update, would wait for ever, and with it the server, which ends
after its open requests. A later call is refused.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

__all__ = ["ends_calls_after", "ends_calls_with_its_task"]

Answer = asyncio.Future | Future


def ends_calls_with_its_task(ensure_reader: Callable[[Any], None]) -> Callable:
    """Wrap what starts the task that reads a client's answers, once there is a loop."""

    @wraps(ensure_reader)
    def ensure(client: Any) -> None:
        resources = client.resources
        is_first = resources.output_queue_task is None
        ensure_reader(client)
        if is_first:
            # Not the client: the task must not keep it alive.
            end = partial(_end_calls, resources, client.utility_results)
            resources.output_queue_task.add_done_callback(end)

    return ensure


@contextmanager
def ends_calls_after(resources: Any, calls: Mapping[int, Answer]) -> Iterator[None]:
    """Decorate the function with which a thread reads a client's answers.

    Args:
        resources: the client's, which say whether the engine is dead.
        calls: what waits for answers, by number.

    """
    try:
        yield
    finally:
        _end_calls(resources, calls)


def _end_calls(
    resources: Any, calls: Mapping[int, Answer], _reader: object = None
) -> None:
    """End open calls, in the thread or the loop in which their answers are read."""
    resources.engine_dead = True
    for answer in list(calls.values()):
        if not answer.done():
            answer.set_exception(EngineDeadError())
