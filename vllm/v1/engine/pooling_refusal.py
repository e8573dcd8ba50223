# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a refused pooling request carries the reason: its output has no stop reason."""

from vllm.outputs import RequestError
from vllm.v1.engine import FinishReason
from vllm.v1.engine.refused_output import POOLING_ERROR_CODE

__all__ = ["pooling_error"]


def pooling_error(
    finish_reason: FinishReason | None, stop_reason: int | str | None
) -> RequestError | None:
    """Return the error of a refused request; None if it was not refused."""
    if finish_reason != FinishReason.ERROR or not isinstance(stop_reason, str):
        return None
    return RequestError(POOLING_ERROR_CODE, stop_reason, retryable=True)
