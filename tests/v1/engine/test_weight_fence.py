# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The fence, on real engine cores whose executor and scheduler are stand-ins."""

import queue
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from torch import nn

from tests.harness.pipe import through_pipe
from vllm.model_executor.model_loader.reload import ReloadStatus
from vllm.model_executor.model_loader.reload.errors import SyncConflictError
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import FinishReason
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.refused_output import WeightsInconsistentError
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import RequestStatus
from vllm.v1.serial_utils import run_method
from vllm.v1.worker import weight_report

REASON = "layers 0 to 3 are new, the others old"


class Model(nn.Module):
    status = ReloadStatus("serving", 0)


class Worker:
    """A worker whose RPCs do to the weights' state what a sync does."""

    def __init__(self, rank: int):
        self.rank = rank
        self.model = Model()
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)

    def harmless(self, value: int) -> int:
        return value + self.rank

    def raises(self) -> None:
        raise ValueError("boom")

    def sync(self, ranks: tuple[int, ...] = (0, 1)) -> None:
        if self.rank in ranks:
            version = self.model.status.version + 1
            self.model.status = ReloadStatus("serving", version)

    finish_weight_update = sync

    def abort_weight_update(self) -> None:
        pass

    compute_weight_checksums = weight_status = abort_weight_update
    shutdown_weight_transfer_engine = abort_weight_update

    def half_a_sync(self) -> None:
        version = self.model.status.version
        self.model.status = ReloadStatus("updating", version, REASON, fenced=True)

    def broken_sync(self) -> None:
        version = self.model.status.version
        self.model.status = ReloadStatus("inconsistent", version, REASON, fenced=True)
        raise RuntimeError("the sync failed")


class Executor:
    """Runs RPCs on workers here, or as if they were in other processes."""

    def __init__(self, ranks: int, in_process: bool = True):
        self.workers = [Worker(rank) for rank in range(ranks)]
        self.in_process = in_process
        self.is_sleeping = False

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        replies = [run_method(w, method, args, kwargs or {}) for w in self.workers]
        return replies if self.in_process else through_pipe(replies)

    def sleep(self, level: int) -> None:
        self.is_sleeping = True
        for worker in self.workers if level == 2 else ():
            worker.model.status = ReloadStatus("inconsistent", 0, "dropped", False)

    def wake_up(self, tags=None) -> None:
        self.is_sleeping = False


class Scheduler:
    """Holds requests, and counts what is forgotten."""

    def __init__(self):
        self.connector = None
        self.requests = {}
        self.forgotten = []
        self.can_reset = True
        self.pause_state = PauseState.UNPAUSED

    def add_request(self, request) -> None:
        self.requests[request.request_id] = request

    def finish_requests(self, request_ids, status) -> None:
        for request_id in request_ids:
            self.requests.pop(request_id).status = status

    def reset_prefix_cache(self, reset_running_requests, reset_connector) -> bool:
        assert reset_running_requests
        self.forgotten.append("prefixes")
        if reset_connector and self.connector is None:
            return False  # as before 0.32
        if reset_connector:
            self.forgotten.append("prefixes of the connector")
        return self.can_reset

    def get_kv_connector(self):
        return self.connector

    def make_stats(self):
        return None

    def set_pause_state(self, state) -> None:
        self.pause_state = state

    def get_num_unfinished_requests(self) -> int:
        return 0 if self.pause_state == PauseState.PAUSED_ALL else len(self.requests)


def make_core(ranks: int = 1, in_process: bool = True, kind=EngineCore):
    core = object.__new__(kind)
    core.scheduler = Scheduler()
    core.model_executor = Executor(ranks, in_process)
    core.reset_encoder_cache = lambda: core.scheduler.forgotten.append("encodings")
    core.pause_scheduler = lambda **kwargs: None
    return core


def make_request(request_id: str, client_index: int = 0, **kwargs):
    fields = dict(
        pooling_params=None,
        sampling_params=SamplingParams(),
        kv_transfer_params=None,
        ec_transfer_params=None,
        abort_immediately=False,
        status=RequestStatus.RUNNING,
    )
    request = SimpleNamespace(
        request_id=request_id, client_index=client_index, **{**fields, **kwargs}
    )
    request.is_finished = lambda: RequestStatus.is_finished(request.status)
    return request


def break_weights(core) -> None:
    with pytest.raises(RuntimeError, match="the sync failed"):
        core.collective_rpc("broken_sync")


def gone(*args, **kwargs):
    raise RuntimeError("cancelled")


def refusals(core):
    """All outputs that wait for delivery."""
    found = []
    while (outputs := core.weight_fence.undelivered()) is not None:
        found += outputs.outputs
    return found


@pytest.fixture(autouse=True)
def stand_in_status(monkeypatch):
    monkeypatch.setattr(weight_report, "reload_status", lambda model: model.status)


def test_an_rpc_returns_what_it_returned():
    core = make_core(ranks=2)
    assert core.collective_rpc("harmless", args=(3,)) == [3, 4]
    assert core.collective_rpc(Worker.harmless, None, (), {"value": 5}) == [5, 6]


def test_an_rpc_raises_what_it_raised_in_this_process():
    with pytest.raises(ValueError, match="boom"):
        make_core().collective_rpc("raises")


def test_an_rpc_on_a_worker_that_is_gone_says_so():
    core = make_core(ranks=2)
    core.model_executor.collective_rpc = gone
    with pytest.raises(RuntimeError, match="cancelled"):
        core.collective_rpc("harmless", args=(3,))
    core.model_executor.is_failed = True
    with pytest.raises(RuntimeError, match="harmless failed: the process of a worker"):
        core.collective_rpc("harmless", args=(3,))


def test_a_failing_rpc_leaves_sound_weights_in_service():
    core = make_core()
    with pytest.raises(ValueError, match="boom"):
        core.collective_rpc("raises")
    core.add_request(make_request("new"))
    assert "new" in core.scheduler.requests


def test_running_requests_end_with_the_reason():
    core = make_core()
    request = make_request("running")
    core.add_request(request)
    break_weights(core)
    assert request.status == RequestStatus.FINISHED_ERROR
    (output,) = refusals(core)
    assert output.request_id == "running"
    assert output.finish_reason == FinishReason.ERROR
    assert REASON in output.stop_reason


def test_new_requests_are_refused_with_the_reason():
    core = make_core()
    break_weights(core)
    core.add_request(make_request("new"))
    assert not core.scheduler.requests
    (output,) = refusals(core)
    assert output.request_id == "new"
    assert output.finish_reason == FinishReason.ERROR
    assert REASON in output.stop_reason
    assert output.pooling_output is None


def test_a_refused_pooling_request_has_an_output():
    core = make_core()
    break_weights(core)
    core.add_request(make_request("pool", pooling_params=object()))
    (output,) = refusals(core)
    assert output.pooling_output.numel() == 0


def test_a_failed_rpc_that_follows_does_not_lift_the_fence():
    core = make_core()
    break_weights(core)
    with pytest.raises(ValueError, match="boom"):
        core.collective_rpc("raises")
    core.add_request(make_request("new"))
    assert not core.scheduler.requests


def test_a_complete_sync_lifts_the_fence():
    core = make_core()
    break_weights(core)
    core.collective_rpc("sync")
    core.add_request(make_request("new"))
    assert "new" in core.scheduler.requests
    assert not refusals(core)


def test_a_request_that_only_frees_resources_passes():
    core = make_core()
    break_weights(core)
    core.abort_requests = lambda request_ids: None
    core.add_request(make_request("free", abort_immediately=True))
    assert "free" in core.scheduler.requests


def test_metrics_learn_of_the_fence_and_of_versions():
    core = make_core()
    core.scheduler.make_stats = SchedulerStats
    told = []
    for rpc in ("half_a_sync", "half_a_sync", "sync"):
        core.collective_rpc(rpc)
        while (outputs := core.weight_fence.undelivered()) is not None:
            told.append(outputs.scheduler_stats.weight_sync)
    assert [(each.version, each.fenced) for each in told] == [(0, True), (1, False)]


def test_new_weights_have_a_name():
    core = make_core()
    core.weight_fence.name_next("step-1")
    core.collective_rpc("sync")
    assert core.get_weight_version() == "step-1"
    core.collective_rpc("sync")
    assert core.get_weight_version() == "2"


def test_a_name_is_for_what_the_next_rpc_commits():
    core = make_core()
    core.set_weight_version("old")
    core.weight_fence.name_next("never")
    break_weights(core)
    assert core.get_weight_version() == "old"
    core.collective_rpc("sync")
    assert core.get_weight_version() == "1"


def test_each_client_gets_its_own_refusals():
    core = make_core(kind=EngineCoreProc)
    core.output_queue = queue.Queue()
    for request_id, client in (("a", 0), ("b", 1), ("c", 0)):
        core.add_request(make_request(request_id, client))
    break_weights(core)
    delivered = dict(core.output_queue.get_nowait() for _ in range(2))
    assert delivered[0].finished_requests == {"a", "c"}
    assert delivered[1].finished_requests == {"b"}
    assert core.output_queue.empty()


def test_a_rank_that_missed_a_commit_raises_the_fence():
    core = make_core(ranks=2)
    core.collective_rpc("sync", args=((0,),))
    core.add_request(make_request("new"))
    (output,) = refusals(core)
    assert "committed on 1 of 2 ranks, but not on rank 1" in output.stop_reason
    core.collective_rpc("sync")
    core.add_request(make_request("new"))
    assert "new" in core.scheduler.requests


def test_ranks_in_other_processes_are_named():
    core = make_core(ranks=2, in_process=False)
    with pytest.raises(RuntimeError) as raised:
        core.collective_rpc("raises")
    assert "raises failed on 2 of 2 workers" in str(raised.value)
    assert "rank 0, 1: ValueError: boom" in str(raised.value)


def test_a_commit_forgets_what_the_old_weights_computed():
    core = make_core()
    core.collective_rpc("sync")
    assert core.scheduler.forgotten == ["prefixes", "encodings"]


def test_what_a_connector_holds_is_forgotten_too():
    core = make_core()
    core.scheduler.connector = object()
    core.collective_rpc("sync")
    assert "prefixes of the connector" in core.scheduler.forgotten


def test_without_a_commit_nothing_is_forgotten():
    core = make_core()
    core.collective_rpc("harmless", args=(1,))
    break_weights(core)
    assert not core.scheduler.forgotten


def test_an_engine_core_tells_whether_it_serves():
    core = make_core()
    core.check_weights()
    break_weights(core)
    with pytest.raises(WeightsInconsistentError, match=REASON):
        core.check_weights()
    core.collective_rpc("sync")
    core.check_weights()


def test_what_cannot_be_forgotten_is_an_error():
    core = make_core()
    core.scheduler.can_reset = False
    with pytest.raises(RuntimeError, match="still holds entries of the old ones"):
        core.collective_rpc("sync")


def test_weights_that_a_sleep_dropped_are_fenced_after_waking_up():
    core = make_core()
    core.sleep(level=2)
    core.add_request(make_request("waiting"))
    assert "waiting" in core.scheduler.requests
    core.wake_up()
    (output,) = refusals(core)
    assert output.request_id == "waiting"
    assert not core.scheduler.requests
    core.collective_rpc("abort_weight_update")
    with pytest.raises(WeightsInconsistentError, match="dropped"):
        core.weight_fence.check()
    core.collective_rpc("finish_weight_update")
    core.weight_fence.check()


@pytest.mark.parametrize("asleep", [(), ("kv_cache",)])
def test_dropped_weights_may_come_by_another_road(asleep):
    core = make_core()
    core.sleep(level=2)
    core.model_executor.sleeping_tags = {"weights", "kv_cache"}
    core.collective_rpc("harmless", args=(1,))  # it cannot write to what is asleep
    core.model_executor.sleeping_tags = set(asleep)
    if not asleep:
        core.wake_up()
        with pytest.raises(WeightsInconsistentError, match="dropped"):
            core.weight_fence.check()
    core.collective_rpc("harmless", args=(1,))
    core.wake_up()
    core.weight_fence.check()


@pytest.mark.parametrize("asleep", [(), ("kv_cache",)])
@pytest.mark.parametrize(
    "method",
    [
        "compute_weight_checksums",
        "raises",
        "shutdown_weight_transfer_engine",
        "weight_status",
    ],
)
def test_dropped_weights_do_not_come_by_questions_or_failures(asleep, method):
    core = make_core()
    core.sleep(level=2)
    core.model_executor.sleeping_tags = set(asleep)
    if not asleep:
        core.wake_up()
    with pytest.raises(ValueError) if method == "raises" else nullcontext():
        core.collective_rpc(method)
    core.model_executor.sleeping_tags = set()
    core.wake_up()
    with pytest.raises(WeightsInconsistentError, match="dropped"):
        core.weight_fence.check()


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_does_not_sleep_while_a_sync_is_open(level):
    core = make_core(ranks=2)
    (_, worker) = core.model_executor.workers
    worker.model.status = ReloadStatus("updating", 0)
    core.collective_rpc("harmless", args=(1,))
    with pytest.raises(SyncConflictError, match="abort_weight_update"):
        core.sleep(level=level)
    assert not core.model_executor.is_sleeping
    core.sleep(level=0)
    core.collective_rpc("sync")
    core.sleep(level=level)
    assert core.model_executor.is_sleeping


def test_weights_that_sleep_are_not_written_to():
    core = make_core()
    core.model_executor.sleeping_tags = {"weights", "kv_cache"}
    with pytest.raises(SyncConflictError, match="wake_up.* before reload_weights"):
        core.collective_rpc("reload_weights")
    assert core.collective_rpc("harmless", args=(1,)) == [1]
    core.model_executor.sleeping_tags = {"kv_cache"}
    with pytest.raises(NotImplementedError):  # the worker is asked
        core.collective_rpc("reload_weights")


def test_weights_that_were_synced_asleep_serve_after_waking_up():
    core = make_core()
    core.sleep(level=2)
    core.add_request(make_request("waiting"))
    core.collective_rpc("harmless", args=(1,))
    core.collective_rpc("sync")
    core.wake_up()
    assert "waiting" in core.scheduler.requests
    assert not refusals(core)


def test_a_sync_that_failed_asleep_is_fenced_after_waking_up():
    core = make_core()
    core.sleep(level=1)
    break_weights(core)
    core.add_request(make_request("waiting"))
    core.wake_up()
    (output,) = refusals(core)
    assert output.request_id == "waiting"


def test_a_mixture_in_the_course_of_a_sync_is_fenced():
    core = make_core()
    core.add_request(make_request("running"))
    core.collective_rpc("half_a_sync")
    (output,) = refusals(core)
    assert output.request_id == "running"
    core.collective_rpc("sync")
    core.add_request(make_request("next"))
    assert not refusals(core)


def test_requests_of_a_paused_engine_wait_for_the_end_of_a_sync():
    core = make_core()
    core.add_request(make_request("running"))
    core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    core.collective_rpc("half_a_sync")
    core.add_request(make_request("waiting"))
    core.collective_rpc("sync")
    core.resume_scheduler()
    assert set(core.scheduler.requests) == {"running", "waiting"}
    assert not refusals(core)


def test_a_mixture_is_fenced_when_the_engine_resumes():
    core = make_core()
    core.add_request(make_request("running"))
    core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    core.collective_rpc("half_a_sync")
    core.resume_scheduler()
    (output,) = refusals(core)
    assert output.request_id == "running"


def test_requests_that_a_pause_lets_finish_meet_the_fence():
    core = make_core()
    core.add_request(make_request("draining"))
    core.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    core.collective_rpc("half_a_sync")
    (output,) = refusals(core)
    assert output.request_id == "draining"


def test_a_light_sleep_asks_nothing():
    core = make_core()
    core.sleep(level=1)
    core.model_executor.collective_rpc = None
    core.wake_up()
