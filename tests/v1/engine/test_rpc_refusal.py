# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An exception's way from an engine core to its client; the messages are vLLM's."""

from concurrent.futures import Future
from typing import Any

import pytest

from vllm.model_executor.model_loader.reload import WeightSyncError
from vllm.model_executor.model_loader.reload.agreement import RankFailedError
from vllm.model_executor.model_loader.reload.errors import Finding, SyncConflictError
from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.core_client import _process_utility_output
from vllm.v1.engine.refused_output import WeightsInconsistentError
from vllm.v1.engine.rpc_refusal import RpcRefusedError
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.worker.rpc_failure import RpcFailedError, RpcFailure

SCALE = Finding("layers.0.experts", "w2_weight_scale_inv", "never sent", 3, "down")
NAN = Finding("layers.1.experts", "w2_weight_scale_inv", "scale is nan", 0, "down")
LISTED_SCALE = {
    "layer": "layers.0.experts",
    "parameter": "w2_weight_scale_inv",
    "expert": 3,
    "shard": "down",
    "detail": "never sent",
}


def call(method: Any, name: str = "collective_rpc") -> Future:
    """Call a method of an engine core from its client."""
    sent: list[UtilityOutput] = []
    EngineCoreProc._invoke_utility_method(name, method, UtilityOutput(7), sent.append)
    message = MsgpackEncoder().encode(EngineCoreOutputs(utility_output=sent[0]))
    received = MsgpackDecoder(EngineCoreOutputs).decode(message)
    future: Future = Future()
    _process_utility_output(received.utility_output, {7: future})
    return future


def raised(error: Exception) -> Any:
    """Raise an exception in the core, and return what its client raises."""

    def fail() -> None:
        raise error

    return call(fail).exception(timeout=0)


def failed(*errors: Exception) -> RpcFailedError:
    failures = {rank: RpcFailure.of(error) for rank, error in enumerate(errors)}
    return RpcFailedError("The RPC failed.", failures)


def test_a_result_arrives():
    assert call(lambda: [{"a": 1}]).result(timeout=0) == [{"a": 1}]


def test_a_deferred_result_arrives():
    deferred: Future = Future()
    deferred.set_result([3])
    assert call(lambda: deferred).result(timeout=0) == [3]


def test_what_is_wrong_arrives():
    error = raised(WeightSyncError("weight sync is incomplete", [SCALE], [NAN]))
    assert isinstance(error, RpcRefusedError)
    assert error.http_status == 422
    assert str(error).startswith("weight sync is incomplete\n  missing: layers.0")
    assert error.refusal.missing == [{**LISTED_SCALE, "ranks": [0]}]
    assert [found["detail"] for found in error.refusal.invalid] == ["scale is nan"]
    assert error.refusal.more == 0


def test_what_a_deferred_call_raised_arrives():
    deferred: Future = Future()
    deferred.set_exception(SyncConflictError("no weight update is open"))
    error = call(lambda: deferred).exception(timeout=0)
    assert isinstance(error, RpcRefusedError)
    assert error.http_status == 409


@pytest.mark.parametrize("insecure", ["0", "1"])
def test_however_results_are_encoded(monkeypatch, insecure):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", insecure)
    error = raised(WeightSyncError("no", [SCALE]))
    assert error.refusal.missing == [{**LISTED_SCALE, "ranks": [0]}]


def test_an_error_of_the_engine_stays_as_it_is():
    error = raised(RuntimeError("out of order"))
    assert type(error) is Exception
    assert str(error) == "Call to collective_rpc method failed: out of order"


def test_a_refusal_of_all_requests_arrives():
    def check() -> None:
        raise WeightsInconsistentError("a mixture")

    error = call(check, "check_weights").exception(timeout=0)
    assert isinstance(error, RpcRefusedError)
    assert (error.http_status, str(error)) == (503, "a mixture")


def test_an_error_of_another_method_stays_as_it_is():
    def fail() -> None:
        raise ValueError("no such adapter")

    error = call(fail, "add_lora").exception(timeout=0)
    assert type(error) is Exception
    assert str(error) == "Call to add_lora method failed: no such adapter"


def test_ranks_are_named_where_they_failed():
    other = WeightSyncError("no", [SCALE], [NAN])
    error = raised(failed(WeightSyncError("no", [SCALE]), other))
    assert error.refusal.missing == [{**LISTED_SCALE, "ranks": [0, 1]}]
    assert [found["ranks"] for found in error.refusal.invalid] == [[1]]
    assert "rank 0: WeightSyncError" in str(error)


def test_the_rank_that_failed_by_itself_says_why():
    error = raised(failed(RankFailedError("rank 1 failed"), ValueError("no such name")))
    assert error.http_status == 400


@pytest.mark.parametrize(
    "errors",
    [
        (ValueError("no such name"), RuntimeError("out of order")),
        (RankFailedError("rank 2 is gone"), RankFailedError("rank 2 is gone")),
    ],
    ids=["an error of the engine among them", "none failed by itself"],
)
def test_a_client_is_not_blamed_for_more_than_it_did(errors):
    assert type(raised(failed(*errors))) is Exception


def test_at_most_20_are_listed_and_the_rest_is_counted():
    def findings(layer: str) -> list[Finding]:
        return [Finding(layer, f"weight_{n}", "never sent") for n in range(30)]

    both = findings("shared")
    error = raised(
        failed(
            WeightSyncError("no", both), WeightSyncError("no", both, findings("own"))
        )
    )
    assert len(error.refusal.missing) == 20
    assert all(found["ranks"] == [0, 1] for found in error.refusal.missing)
    assert error.refusal.invalid == []
    assert error.refusal.more == 30 + 60 - 20 * 2


def test_who_does_not_wait_any_more_is_left_alone():
    sent: list[UtilityOutput] = []

    def fail() -> None:
        raise WeightSyncError("no")

    output = UtilityOutput(7)
    EngineCoreProc._invoke_utility_method("collective_rpc", fail, output, sent.append)
    cancelled: Future = Future()
    cancelled.cancel()
    waiting = {7: cancelled}
    _process_utility_output(sent[0], waiting)
    assert not waiting
