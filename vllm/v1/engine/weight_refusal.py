# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How an engine core ends requests that its weights must not serve.

Their finish reason is "error", and their stop reason says why.
"""

from collections.abc import Iterable

import torch

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request

__all__ = ["refuse"]


def refuse(requests: Iterable[Request], reason: str) -> EngineCoreOutputs:
    """Return the outputs that end requests of one client with a reason."""
    outputs = [_refusal(request, reason) for request in requests]
    ended = {output.request_id for output in outputs}
    return EngineCoreOutputs(outputs=outputs, finished_requests=ended)


def _refusal(request: Request, reason: str) -> EngineCoreOutput:
    # The output of a pooling request must be there, if empty: without it the output
    # processor takes the request for one that generates text, and fails.
    data = None if request.pooling_params is None else torch.empty(0, device="cpu")
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        pooling_output=data,
        finish_reason=FinishReason.ERROR,
        stop_reason=reason,
    )
