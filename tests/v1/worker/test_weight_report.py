# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a worker replies to an RPC."""

from types import SimpleNamespace

import pytest
from torch import nn

from tests.harness.pipe import through_pipe
from vllm.model_executor.model_loader.reload import WeightSyncError, mark_inconsistent
from vllm.v1.worker.rpc_failure import RpcFailedError, RpcFailure
from vllm.v1.worker.weight_report import (
    WorkerReply,
    models_of,
    results_of,
    run_and_report,
    weight_states,
)


class Worker:
    def __init__(self, **models: nn.Module):
        getters = {
            f"get_{name}": lambda model=model: model for name, model in models.items()
        }
        self.model_runner = SimpleNamespace(**getters)

    def double(self, value: int) -> int:
        return 2 * value

    def lose(self, method: str) -> None:
        mark_inconsistent(self.model_runner.get_model(), method)
        raise WeightSyncError("lost")


def test_a_reply_has_result_and_state():
    reply = run_and_report("double", Worker(model=nn.Linear(1, 1)), value=4)
    assert reply.result == 8
    assert reply.error is None
    assert [state.state for state in reply.states] == ["serving"]


def test_a_reply_to_a_failed_rpc_has_the_state_that_it_left():
    reply = run_and_report("lose", Worker(model=nn.Linear(1, 1)), method="why")
    assert isinstance(reply.error, WeightSyncError)
    assert [(state.fenced, state.detail) for state in reply.states] == [(True, "why")]


def test_a_function_gets_the_worker():
    reply = run_and_report(lambda worker, n: worker.double(n), Worker(), 3)
    assert reply == WorkerReply(6, None, ())


def test_the_served_model_comes_before_the_draft_model():
    model, draft = nn.Linear(1, 1), nn.Linear(1, 1)
    mark_inconsistent(draft, "no draft weights")
    worker = Worker(draft_model=draft, model=model)
    assert models_of(worker) == [model, draft]
    assert [state.state for state in weight_states(worker)] == [
        "serving",
        "inconsistent",
    ]


@pytest.mark.parametrize(
    "worker",
    [SimpleNamespace(), Worker(), Worker(model=object()), Worker(draft_model=None)],
    ids=["no runner", "no models", "no torch model", "no draft model"],
)
def test_a_worker_without_models_reports_none(worker):
    assert models_of(worker) == []


def test_of_an_exception_travels_what_can_be_said_of_it():
    class Unpicklable(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    reply = through_pipe(WorkerReply(None, Unpicklable(1, 2), ()))
    assert reply.error == RpcFailure("Unpicklable: 1 and 2")


def test_results_in_order_of_rank():
    assert results_of([WorkerReply(n, None, ()) for n in (3, 1, 2)], "rpc") == [3, 1, 2]


def test_an_exception_of_this_process_is_raised_unchanged():
    error = WeightSyncError("no")
    with pytest.raises(WeightSyncError) as raised:
        results_of([WorkerReply(None, error, ())], "rpc")
    assert raised.value is error


def test_failed_ranks_are_named_once_per_text():
    a, b = RpcFailure("A: a"), RpcFailure("B: b")
    with pytest.raises(RpcFailedError) as raised:
        results_of([WorkerReply(1, error, ()) for error in (a, None, b, a)], "rpc")
    summary, *ranks = str(raised.value).splitlines()
    assert "rpc failed on 3 of 4 workers" in summary
    assert ranks == ["rank 0, 3: A: a", "rank 2: B: b"]
    assert raised.value.failures == {0: a, 2: b, 3: a}
