# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a user gets in place of the output of a refused request.

A user of `LLMEngine.step` sees the output as the engine core ended it: finish reason
"error", and the reason as its stop reason. `LLM` and `AsyncLLM` raise
`WeightsInconsistentError` instead, which the HTTP server answers with status 503.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from http import HTTPStatus
from typing import ParamSpec, TypeVar

from vllm.exceptions import GracefulHTTPError
from vllm.outputs import PoolingRequestOutput, RequestOutput

__all__ = [
    "POOLING_ERROR_CODE",
    "WeightsInconsistentError",
    "error_if_refused",
    "raises_if_refused",
]

POOLING_ERROR_CODE = "weights_inconsistent"

Output = RequestOutput | PoolingRequestOutput
OutputsT = TypeVar("OutputsT", bound=Iterable[Output])
P = ParamSpec("P")


class WeightsInconsistentError(GracefulHTTPError):
    """The engine holds no complete set of weights, so it does not serve requests.

    It serves again once a complete weight sync has succeeded.
    """

    def __init__(self, reason: str):
        super().__init__(reason, HTTPStatus.SERVICE_UNAVAILABLE)


def error_if_refused(output: Output | Exception) -> Output | Exception:
    """Return the error to raise in place of a refused request's output."""
    if isinstance(output, Exception):
        return output
    reason = _reason(output)
    return output if reason is None else WeightsInconsistentError(reason)


def raises_if_refused(run: Callable[P, OutputsT]) -> Callable[P, OutputsT]:
    """Wrap a run of all requests to their end, which raises if one was refused.

    It raises at the end, because requests left behind would come up in the next run.
    """

    @wraps(run)
    def checked(*args: P.args, **kwargs: P.kwargs) -> OutputsT:
        outputs = run(*args, **kwargs)
        for output in outputs:
            if (reason := _reason(output)) is not None:
                raise WeightsInconsistentError(reason)
        return outputs

    return checked


def _reason(output: Output) -> str | None:
    if isinstance(output, PoolingRequestOutput):
        return _pooling_reason(output)
    for completion in output.outputs:
        if completion.finish_reason == "error" and completion.stop_reason:
            return str(completion.stop_reason)
    return None


def _pooling_reason(output: PoolingRequestOutput) -> str | None:
    # Before 0.32 a pooling output carries no error.
    error = getattr(output, "error", None)
    if error is None or error.code != POOLING_ERROR_CODE:
        return None
    return error.message
