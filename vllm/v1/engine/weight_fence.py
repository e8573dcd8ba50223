# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The fence between requests and weights that must not serve them.

After every RPC the workers report the state of their weights. If one of them holds a
mixture of old and new weights, or if some ranks committed new weights and others did
not, the fence goes up: running requests end with the reason and new ones are refused
with it, while the engine core lives on. A complete sync takes it down. Requests of an
engine that is paused or asleep wait, and meet the fence when it resumes. Whenever
weights were committed, what was computed from the old ones is forgotten.

A kernel may also find that the weights are bad, while they serve. The requests that the
step has run then end with the reason too, in place of its output.

    engine core                              workers
    collective_rpc(method) ----------------> run_and_report(method)
    fence.observe(states)  <---------------- result, state of the weights
    add_request(request): fence.admits(request)?
    outputs = step() ----------------------> kernels
    fence.check_step(outputs) <------------- bad scale
"""

import queue
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from vllm.logger import init_logger
from vllm.model_executor.model_loader.reload import ReloadStatus
from vllm.model_executor.model_loader.reload.errors import SyncConflictError
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.refused_output import WeightsInconsistentError
from vllm.v1.engine.weight_refusal import refuse, refuse_finished
from vllm.v1.engine.weight_state import EngineWeightState
from vllm.v1.engine.weight_sync_feed import WeightSyncFeed
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker.weight_report import results_of, run_and_report, weight_states

if TYPE_CHECKING:
    from vllm.v1.worker.scale_guard import ScaleGuard

__all__ = [
    "WeightFence",
    "fence_in_background",
    "fence_in_process",
    "fenced_resume",
    "fenced_rpc",
    "fenced_step",
]

logger = init_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
CoreMethod = Callable[Concatenate[Any, P], R]
Outbox = queue.Queue[tuple[int, EngineCoreOutputs]]
# Of a step: by client, or None if it only queued a batch; and whether the model ran.
StepOutputs = dict[int, EngineCoreOutputs] | None
CoreStep = Callable[[Any], tuple[StepOutputs, bool]]

REFUSAL = (
    "The weights of this engine are inconsistent: it refuses requests until a complete "
    "weight sync succeeds. Reason: {reason}"
)

WRITING_RPCS = frozenset(
    {
        "start_weight_update",
        "start_draft_weight_update",
        "update_weights",
        "prepare_weight_update",
        "finish_weight_update",
        "reload_weights",
    }
)

# RPCs that leave the weights as they are, or bring them by a sync that says so.
SYNC_RPCS = WRITING_RPCS | {
    "abort_weight_update",
    "compute_weight_checksums",
    "get_model_inspection",
    "init_weight_transfer_engine",
    "sent_checksums",
    "shutdown_weight_transfer_engine",
    "weight_status",
    "weight_update_reach",
}

# An executor that lost a worker ends the others, and says "cancelled".
WORKER_GONE = (
    "The RPC {method} failed: the process of a worker is gone, and this engine ends "
    "with it. The log above names the worker; start the server again."
)


class WeightFence:
    """Decides which requests an engine core may serve with the weights that it has.

    Args:
        core: the engine core.
        outbox: where outputs for a client go: (client index, outputs).

    Attributes:
        feed: what metrics learn of the weights.

    """

    def __init__(self, core: Any, outbox: Outbox):
        self.feed = WeightSyncFeed(core, outbox)
        self._core = core
        self._outbox = outbox
        self._weights = EngineWeightState()
        self._refusal: str | None = None
        self._next_name: str | None = None
        # Weights that a sleep dropped: to be asked for, and known to be gone.
        self._dropped = False
        self._gone = False

    def observe(self, states: Sequence[tuple[ReloadStatus, ...]]) -> None:
        """Take in the weights' states of all workers, in order of rank.

        Raises:
            RuntimeError: new weights are in service, but what was computed from the old
                ones could not be forgotten.

        """
        before, self._weights = self._weights, self._weights.after(states)
        self._gone = self._gone and self._weights.lost is not None
        name, self._next_name = self._next_name, None
        self._move()
        try:
            if self._weights.committed_since(before):
                self._core.set_weight_version(name or str(self._version))
                self._forget_computed()
        finally:
            self._tell()

    def name_next(self, name: str) -> None:
        """Give a name to the weights that the next RPC commits.

        Weights that nobody names are called by the number of complete syncs.
        """
        self._next_name = name

    def admits(self, request: Request) -> bool:
        """Whether to serve a request; one that is refused is told so here.

        A request that is to be aborted at once frees resources of another engine. It
        meets no weights, and passes.
        """
        if self._refusal is None or getattr(request, "abort_immediately", False):
            return True
        self._end([request], self._refusal)
        return False

    def check(self) -> None:
        """Check that requests are served.

        Raises:
            WeightsInconsistentError: they are refused; the message says why.

        """
        if self._refusal is not None:
            raise WeightsInconsistentError(self._refusal)

    def check_step(self, outputs: StepOutputs) -> None:
        """Fail what a step served, if a kernel met a bad scale in it.

        Requests that wait for the end of a pause fail too: the step has run them.

        Args:
            outputs: the step's outputs, changed in place.

        """
        if self._scale_guard is None:
            return
        reason = self._scale_guard.look()
        if met := self._scale_guard.take_met():
            self.feed.note_bad_scales([met])
        if reason is not None:
            self._fail_step(outputs)
        self._tell()

    def _fail_step(self, outputs: StepOutputs) -> None:
        states = self._core.model_executor.collective_rpc(weight_states)
        self._weights = self._weights.after(states)
        refusal = REFUSAL.format(reason=self._weights.reason)
        self._put_up(refusal)
        for theirs in (outputs or {}).values():
            refuse_finished(theirs, refusal)

    def undelivered(self) -> EngineCoreOutputs | None:
        """Take the next outputs from the outbox, for a core without a thread for it."""
        try:
            _, outputs = self._outbox.get_nowait()
        except queue.Empty:
            return None
        return outputs

    def fall_asleep(self, level: int) -> None:
        """Remember that a sleep of this level was asked for.

        Raises:
            SyncConflictError: a sync is open, and would write to memory that is gone.

        """
        if level >= 1 and self._weights.updating:
            raise SyncConflictError(
                "a weight update is open; end it with finish_weight_update or "
                "abort_weight_update before the engine goes to sleep"
            )
        self._dropped = self._dropped or level >= 2

    def check_awake(self, method: str | Callable) -> None:
        """Check that the weights are there, if an RPC writes to them.

        Raises:
            SyncConflictError: they are asleep.

        """
        if method in WRITING_RPCS and self._weights_sleep:
            raise SyncConflictError(
                f"the weights are asleep; call wake_up, with tags=weights to leave the "
                f"rest asleep, before {method}"
            )

    def note_road(self, method: str | Callable) -> None:
        """Note an RPC that worked, and may have brought weights that sleep had dropped.

        Nobody can tell whether it did: they are served again.
        """
        if method not in SYNC_RPCS and not self._weights_sleep:
            self._dropped = self._gone = False

    def resume(self) -> None:
        """Ask for the state of the weights if sleep dropped them, and act on it."""
        if self._core.model_executor.is_sleeping:
            return
        if self._dropped:
            self._dropped, self._gone = False, True
            self.observe(self._core.model_executor.collective_rpc(weight_states))
        self._move()
        self._tell()

    @property
    def _weights_sleep(self) -> bool:
        return "weights" in getattr(self._core.model_executor, "sleeping_tags", ())

    @property
    def _reason(self) -> str | None:
        """Why the weights must not be served; None if they may."""
        return self._weights.reason or (self._weights.lost if self._gone else None)

    @property
    def _version(self) -> int:
        return min(self._weights.versions, default=0)

    @cached_property
    def _scale_guard(self) -> "ScaleGuard | None":
        # Clients import this module, and run no kernels.
        from vllm.v1.worker.scale_guard import guard_of

        return guard_of(self._core.model_executor)

    def _move(self) -> None:
        """Put the fence up or down.

        Requests that wait meet no weights. These may be complete before they need to
        wait no longer, so the fence does not go up.
        """
        if self._reason is None:
            self._take_down()
        elif not self._requests_wait():
            self._put_up(REFUSAL.format(reason=self._reason))

    def _tell(self) -> None:
        self.feed.tell(self._version, self._refusal is not None)

    def _requests_wait(self) -> bool:
        """Whether no request is served; while a pause drains, some still are."""
        if self._core.model_executor.is_sleeping:
            return True
        scheduler = self._core.scheduler
        is_paused = scheduler.pause_state != PauseState.UNPAUSED
        return is_paused and not scheduler.get_num_unfinished_requests()

    def _take_down(self) -> None:
        if self._refusal is not None:
            logger.info("The weights are complete again: requests are served.")
        self._refusal = None

    def _put_up(self, refusal: str) -> None:
        if refusal == self._refusal:
            return
        logger.error(refusal)
        self._refusal = refusal
        scheduler = self._core.scheduler
        running = [r for r in scheduler.requests.values() if not r.is_finished()]
        scheduler.finish_requests(
            [request.request_id for request in running], RequestStatus.FINISHED_ERROR
        )
        self._end(running, refusal)

    def _end(self, requests: Iterable[Request], refusal: str) -> None:
        by_client = defaultdict[int, list[Request]](list)
        for request in requests:
            by_client[request.client_index].append(request)
        for client, theirs in by_client.items():
            self._outbox.put_nowait((client, refuse(theirs, refusal)))

    def _forget_computed(self) -> None:
        """Forget cached prefixes, encoder outputs and scales found bad.

        Requests in flight are preempted: their blocks are cached prefixes too, and the
        encoder outputs that they count on are gone. They start again with the new
        weights.
        """
        from vllm.v1.worker.scale_guard import forget_bad_scales

        # Before 0.32, to reset a connector that is not there counts as a failure.
        has_connector = self._core.scheduler.get_kv_connector() is not None
        forgotten = self._core.reset_prefix_cache(
            reset_running_requests=True, reset_connector=has_connector
        )
        self._core.reset_encoder_cache()
        met = self._core.model_executor.collective_rpc(forget_bad_scales)
        self.feed.note_bad_scales(met)
        if not forgotten:
            raise RuntimeError(
                "New weights are in service, but the prefix cache or that of the KV "
                "connector could not be reset: it still holds entries of the old ones."
            )


def fence_in_process(core: Any) -> WeightFence:
    """Return a fence for an engine core that its client steps, and asks for outputs."""
    return WeightFence(core, queue.Queue())


def fence_in_background(core: Any) -> WeightFence:
    """Return a fence for an engine core that sends its outputs from a queue."""
    return WeightFence(core, core.output_queue)


def fenced_rpc(collective_rpc: CoreMethod) -> CoreMethod:
    """Wrap an engine core's RPC to all workers: the fence sees what it did."""

    @wraps(collective_rpc)
    def watched(core: Any, method: str | Callable, *args: Any, **kwargs: Any) -> Any:
        reporting = partial(run_and_report, method)
        core.weight_fence.check_awake(method)
        try:
            replies = collective_rpc(core, reporting, *args, **kwargs)
        except RuntimeError as error:
            if getattr(core.model_executor, "is_failed", False):
                raise RuntimeError(WORKER_GONE.format(method=method)) from error
            raise
        if not any(reply.error for reply in replies):
            core.weight_fence.note_road(method)
        core.weight_fence.feed.note_replies(replies)
        core.weight_fence.observe([reply.states for reply in replies])
        return results_of(replies, method)

    return watched


def fenced_resume(resume: CoreMethod[P, R]) -> CoreMethod[P, R]:
    """Wrap what ends a pause or a sleep of an engine core.

    The weights may be a mixture, or be gone.
    """

    @wraps(resume)
    def watched(core: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        result = resume(core, *args, **kwargs)
        core.weight_fence.resume()
        return result

    return watched


def fenced_step(step: CoreStep) -> CoreStep:
    """Wrap a step of an engine core: what bad weights answered goes to nobody."""

    @wraps(step)
    def watched(core: Any) -> tuple[StepOutputs, bool]:
        outputs, model_executed = step(core)
        core.weight_fence.check_step(outputs)
        return outputs, model_executed

    return watched
