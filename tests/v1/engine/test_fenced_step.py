# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A step in which a kernel met a bad scale, on engine cores with stand-ins."""

import queue
from types import SimpleNamespace

import pytest
import torch

from tests.v1.engine.test_weight_fence import make_core, make_request, refusals
from vllm.model_executor.model_loader.reload import ReloadStatus
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.weight_fence import fenced_step
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.metrics.weight_sync import WeightSyncStats
from vllm.v1.request import RequestStatus
from vllm.v1.worker import weight_report

REASON = "a kernel met a bad weight scale: experts.w2_weight_scale_inv expert 0"


class Guard:
    """Finds what it is told to, and condemns the model."""

    is_off = False
    is_core_looking = True

    def __init__(self, worker):
        self.worker = worker
        self.met = self.reported = False
        self.forgotten = 0

    def look(self) -> str | None:
        if not self.met:
            return None
        self.met = False
        self.reported = True
        version = self.worker.model.status.version
        self.worker.model.status = ReloadStatus("inconsistent", version, REASON, True)
        return REASON

    def take_met(self) -> int:
        return int(self.reported)

    def forget(self) -> None:
        self.forgotten += 1


def make_guarded_core(**kwargs):
    core = make_core(**kwargs)
    (worker,) = core.model_executor.workers
    worker.scale_guard = Guard(worker)
    core.model_executor.driver_worker = worker
    core.guard = worker.scale_guard
    return core


@fenced_step
def step(core):
    """Run a request to its end, and one that goes on."""
    request = core.scheduler.requests.pop("last")
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    return {0: EngineCoreOutputs(outputs=[*outputs(request)])}, True


def outputs(request):
    data = torch.ones(4) if request.pooling_params else None
    yield EngineCoreOutput("last", [7], None, None, data, FinishReason.LENGTH)
    yield EngineCoreOutput("running", [8])


@fenced_step
def queue_a_batch(core):
    return None, True


@pytest.fixture(autouse=True)
def stand_in_status(monkeypatch):
    monkeypatch.setattr(weight_report, "reload_status", lambda model: model.status)


def with_requests(core):
    core.add_request(make_request("last"))
    core.add_request(make_request("running"))
    return core


def test_a_good_step_is_left_alone():
    core = with_requests(make_guarded_core())
    result, model_executed = step(core)
    assert [output.new_token_ids for output in result[0].outputs] == [[7], [8]]
    assert model_executed
    assert not refusals(core)


def test_each_request_ends_once_with_the_reason_and_without_tokens():
    core = with_requests(make_guarded_core())
    core.guard.met = True
    result, _ = step(core)
    ended = result[0].outputs + refusals(core)
    assert [output.request_id for output in ended] == ["last", "running"]
    for output in ended:
        assert output.new_token_ids == []
        assert output.finish_reason == FinishReason.ERROR
        assert REASON in output.stop_reason
    assert not core.scheduler.requests


def test_metrics_learn_of_a_bad_scale():
    core = with_requests(make_guarded_core())
    core.scheduler.make_stats = SchedulerStats
    core.guard.met = True
    step(core)
    refusal = core.weight_fence.undelivered()
    told = core.weight_fence.undelivered()
    assert refusal.scheduler_stats is None
    assert told.scheduler_stats.weight_sync == WeightSyncStats(0, True, 1)


def test_a_pooling_request_ends_with_an_empty_output():
    core = with_requests(make_guarded_core())
    core.scheduler.requests["last"].pooling_params = object()
    core.guard.met = True
    (output,) = step(core)[0][0].outputs
    assert output.pooling_output.numel() == 0
    assert REASON in output.stop_reason


def test_a_step_that_queued_a_batch_fails_too():
    core = with_requests(make_guarded_core())
    core.guard.met = True
    assert queue_a_batch(core) == (None, True)
    assert {output.request_id for output in refusals(core)} == {"last", "running"}


def test_requests_are_refused_until_a_complete_sync():
    core = make_guarded_core()
    core.guard.met = True
    queue_a_batch(core)
    core.add_request(make_request("refused"))
    (output,) = refusals(core)
    assert REASON in output.stop_reason
    core.collective_rpc("sync")
    assert core.guard.forgotten == 1
    core.add_request(make_request("served"))
    assert set(core.scheduler.requests) == {"served"}


def test_requests_of_a_paused_engine_fail():
    core = with_requests(make_guarded_core())
    core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    core.guard.met = True
    step(core)
    (output,) = refusals(core)
    assert output.request_id == "running"


def test_a_background_core_sends_refusals_from_its_queue():
    core = make_guarded_core(kind=EngineCoreProc)
    core.output_queue = queue.Queue()
    core.add_request(make_request("running", client_index=3))
    core.guard.met = True
    queue_a_batch(core)
    client, sent = core.output_queue.get_nowait()
    assert (client, sent.finished_requests) == (3, {"running"})


@pytest.mark.parametrize("guard", ["is_off", "is_core_looking"])
def test_a_core_that_must_not_look(guard):
    core = with_requests(make_guarded_core())
    core.guard.met = True
    setattr(core.guard, guard, guard == "is_off")
    result, _ = step(core)
    assert len(result[0].outputs) == 2
    assert core.guard.met


def test_a_core_without_a_worker_in_its_process():
    core = make_core(ranks=2)
    core.model_executor.driver_worker = SimpleNamespace()
    assert queue_a_batch(core) == (None, True)


@pytest.mark.parametrize("name", ["step", "step_with_batch_queue"])
def test_the_engine_core_is_guarded(name):
    assert getattr(EngineCoreProc, name).__wrapped__
