# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a client did wrong in an RPC, on its way from the engine core to the client.

vLLM sends the text of an exception, and the client raises it as a plain `Exception`.
Where the client is at fault, what it needs to put things right goes beside the text:

    engine core                                   client
    result = collective_rpc(...)  raises
    output.failure_message = text
    output.result = what is wrong  ------------>  raise RpcRefusedError
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import wraps
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import UtilityOutput
from vllm.v1.serial_utils import UtilityResult

__all__ = ["RpcRefusal", "RpcRefusedError", "raises_refusals", "tells_refusals"]

Invoke = Callable[[str, Callable[[], Any], UtilityOutput, Callable], None]
Process = Callable[[UtilityOutput, dict[int, Any]], None]

TOLD = ("collective_rpc", "check_weights", "sleep")
MAX_LISTED = 20


@dataclass(frozen=True)
class RpcRefusal:
    """What a client did wrong, in plain data.

    Attributes:
        message: says all of it in text.
        status: the HTTP status that fits.
        missing: what a sync owed and did not bring: layer, parameter, expert, shard,
            detail, and the ranks that miss it.
        invalid: what it brought and must not be served, in the same way.
        more: how many of these are not listed, on each rank that found them; at most
            20 are.

    """

    message: str
    status: int
    missing: list[dict[str, Any]]
    invalid: list[dict[str, Any]]
    more: int

    @classmethod
    def of(cls, error: Exception) -> "RpcRefusal | None":
        """Describe an exception; None if it is no fault of the client."""
        # Clients import this module, and have no workers.
        from vllm.v1.worker.rpc_failure import RpcFailedError, RpcFailure

        if isinstance(error, GracefulHTTPError):
            return cls(str(error), error.http_status, [], [], 0)
        if isinstance(error, RpcFailedError):
            failures = error.failures
        else:
            failures = {0: RpcFailure.of(error)}
        status = _status(failure.status for failure in failures.values())
        if status is None:
            return None
        missing = _listed({rank: each.missing for rank, each in failures.items()})
        invalid = _listed({rank: each.invalid for rank, each in failures.items()})
        found = sum(each.more for each in failures.values())
        found += _count(missing) + _count(invalid)
        missing = missing[:MAX_LISTED]
        invalid = invalid[: MAX_LISTED - len(missing)]
        more = found - _count(missing) - _count(invalid)
        return cls(str(error), status, missing, invalid, more)


class RpcRefusedError(GracefulHTTPError):
    """The workers refused an RPC for what the client asked or sent.

    Attributes:
        refusal: what is wrong.

    """

    def __init__(self, refusal: RpcRefusal):
        super().__init__(refusal.message, HTTPStatus(refusal.status))
        self.refusal = refusal


def tells_refusals(invoke: Invoke) -> Invoke:
    """Wrap how an engine core calls a method for a client and sends what came of it.

    Other methods than those in `TOLD` keep their errors as they are.
    """

    @wraps(invoke)
    def telling(
        name: str,
        get_result: Callable[[], Any],
        output: UtilityOutput,
        enqueue_output: Callable,
    ) -> None:
        if name not in TOLD:
            return invoke(name, get_result, output, enqueue_output)

        def noted() -> Any:
            try:
                return get_result()
            except Exception as error:
                if (refusal := RpcRefusal.of(error)) is not None:
                    output.result = UtilityResult(asdict(refusal))
                raise

        invoke(name, noted, output, enqueue_output)

    return telling


def raises_refusals(process: Process) -> Process:
    """Wrap how a client hands what came of a call to whoever waits for it."""

    @wraps(process)
    def raising(
        output: UtilityOutput, waiting: dict[int, asyncio.Future | Future]
    ) -> None:
        if output.failure_message is None or output.result is None:
            return process(output, waiting)
        future = waiting.pop(output.call_id)
        if not future.done():  # else whoever waited has gone
            refusal = RpcRefusal(**output.result.result)
            future.set_exception(RpcRefusedError(refusal))

    return raising


def _status(statuses: Iterable[HTTPStatus | None]) -> HTTPStatus | None:
    """Return the status of the ranks' failures; None if one is no fault of the client.

    A rank that failed because another one did has nothing to say.
    """
    own = [status for status in statuses if status != HTTPStatus.FAILED_DEPENDENCY]
    return own[0] if own and None not in own else None


def _listed(findings: Mapping[int, Iterable[Any]]) -> list[dict[str, Any]]:
    """Return what the ranks found, each thing once and with its ranks."""
    ranks = defaultdict[Any, list[int]](list)
    for rank, found in findings.items():
        for finding in found:
            ranks[finding].append(rank)
    return [{**asdict(finding), "ranks": at} for finding, at in ranks.items()]


def _count(listed: list[dict[str, Any]]) -> int:
    return sum(len(each["ranks"]) for each in listed)
