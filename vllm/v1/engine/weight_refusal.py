# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How an engine core ends requests that its weights must not serve.

Their finish reason is "error", and their stop reason says why.
"""

from collections.abc import Iterable

import torch

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request

__all__ = ["refuse", "refuse_finished"]


def refuse(requests: Iterable[Request], reason: str) -> EngineCoreOutputs:
    """Return the outputs that end requests of one client with a reason."""
    outputs = [
        _refusal(request.request_id, request.pooling_params is not None, reason)
        for request in requests
    ]
    ended = {output.request_id for output in outputs}
    return EngineCoreOutputs(outputs=outputs, finished_requests=ended)


def refuse_finished(outputs: EngineCoreOutputs, reason: str) -> None:
    """Put refusals in the place of a step's outputs for one client.

    Only of requests that the step has finished: the others get theirs when they are
    ended.
    """
    outputs.outputs = [
        _refusal(output.request_id, output.pooling_output is not None, reason)
        for output in outputs.outputs
        if output.finished
    ]


def _refusal(request_id: str, is_pooling: bool, reason: str) -> EngineCoreOutput:
    # The output of a pooling request must be there, if empty: without it the output
    # processor takes the request for one that generates text, and fails.
    return EngineCoreOutput(
        request_id=request_id,
        new_token_ids=[],
        pooling_output=torch.empty(0, device="cpu") if is_pooling else None,
        finish_reason=FinishReason.ERROR,
        stop_reason=reason,
    )
