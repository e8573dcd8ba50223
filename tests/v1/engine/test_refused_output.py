# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a user gets for a refused request, from the engine core's output on."""

import asyncio
from types import SimpleNamespace

import pytest

from vllm.entrypoints.serve.exception_handling.error_response import (
    create_error_response,
)
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.refused_output import WeightsInconsistentError, raises_if_refused
from vllm.v1.engine.weight_refusal import refuse

REASON = "the weights are a mixture"

PARAMS = [
    dict(sampling_params=SamplingParams(detokenize=False), pooling_params=None),
    dict(sampling_params=None, pooling_params=PoolingParams(task="embed")),
]
KINDS = pytest.mark.parametrize("params", PARAMS, ids=["text", "pooling"])


def process(outputs, params, queue=None):
    """Run outputs of one request through the output processor of a client."""
    processor = OutputProcessor(tokenizer=None, log_stats=False)
    request = EngineCoreRequest(
        request_id="r-1",
        external_req_id="r",
        prompt_token_ids=[1, 2],
        mm_features=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        **params,
    )
    processor.add_request(request, prompt=None, queue=queue)
    processed = processor.process_outputs(outputs)
    assert not processor.has_unfinished_requests()
    return processed.request_outputs


def refused(params):
    pooling = params["pooling_params"]
    request = SimpleNamespace(request_id="r-1", pooling_params=pooling)
    return refuse([request], REASON).outputs


@KINDS
def test_async_llm_raises_the_reason(params):
    collector = RequestOutputCollector(RequestOutputKind.DELTA, "r-1")
    process(refused(params), params, collector)
    with pytest.raises(WeightsInconsistentError, match=REASON):
        asyncio.run(collector.get())


@KINDS
def test_llm_raises_the_reason(params):
    run = raises_if_refused(lambda: process(refused(params), params))
    with pytest.raises(WeightsInconsistentError, match=REASON):
        run()


def test_llm_engine_shows_the_reason():
    (output,) = process(refused(PARAMS[0]), PARAMS[0])
    assert output.finished
    assert output.outputs[0].finish_reason == "error"
    assert output.outputs[0].stop_reason == REASON


@pytest.mark.parametrize(
    "reason, stop_reason",
    [
        (FinishReason.ERROR, None),
        (FinishReason.STOP, "</end>"),
        (FinishReason.ABORT, None),
    ],
    ids=["error without a reason", "stop string", "abort"],
)
def test_other_ends_are_left_alone(reason, stop_reason):
    ended = EngineCoreOutput("r-1", [], finish_reason=reason, stop_reason=stop_reason)
    collector = RequestOutputCollector(RequestOutputKind.DELTA, "r-1")
    process([ended], PARAMS[0], collector)
    output = asyncio.run(collector.get())
    assert output.outputs[0].finish_reason == str(reason)
    assert output.outputs[0].stop_reason == stop_reason


def test_the_server_answers_503_with_the_reason():
    error = create_error_response(WeightsInconsistentError(REASON)).error
    assert error.code == 503
    assert error.message == REASON
