# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a worker tells the engine core after an RPC: its result, and its weights' state.

Both travel in one reply, also when the RPC raised, and with them the reports of syncs
that it ended. So the engine core knows the state
of every worker's weights after every RPC, and reads all the replies to a failed one: an
exception as a reply would leave those of other workers in their queues, where the next
RPC would take them for its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vllm.logger import init_logger
from vllm.model_executor.model_loader.reload import ReloadStatus, reload_status
from vllm.model_executor.model_loader.reload.layerwise import take_reports
from vllm.model_executor.model_loader.reload.sync_report import SyncReport
from vllm.v1.serial_utils import run_method
from vllm.v1.worker.rpc_failure import RpcFailedError, RpcFailure

__all__ = [
    "WorkerReply",
    "models_of",
    "results_of",
    "run_and_report",
    "weight_states",
    "weight_status",
]

logger = init_logger(__name__)


@dataclass(frozen=True)
class WorkerReply:
    """The outcome of an RPC on one worker.

    Attributes:
        result: what the RPC returned; None if it raised.
        error: what it raised; between processes, what can be said of it.
        states: the weights' state of this worker's models, the served one first.
        ended: the syncs that have ended since the reply before.

    """

    result: Any
    error: Exception | RpcFailure | None
    states: tuple[ReloadStatus, ...]
    ended: tuple[SyncReport, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        error = self.error
        if isinstance(error, Exception):
            error = RpcFailure.of(error)
        return type(self), (self.result, error, self.states, self.ended)


def run_and_report(
    method: str | Callable[..., Any], worker: Any, /, *args: Any, **kwargs: Any
) -> WorkerReply:
    """Run an RPC on a worker and never raise.

    Args:
        method: name of a worker's method, or a function that takes the worker first.
        worker: the worker, or its wrapper in an executor.
        args: positional arguments of the RPC.
        kwargs: keyword arguments of the RPC.

    """
    try:
        result, error = run_method(worker, method, args, kwargs), None
    except Exception as failure:
        logger.exception("The RPC %s failed on this worker.", method)
        result, error = None, failure
    ended = [report for model in models_of(worker) for report in take_reports(model)]
    return WorkerReply(result, error, weight_states(worker), tuple(ended))


def weight_states(worker: Any) -> tuple[ReloadStatus, ...]:
    """Return the weights' state of a worker's models, the served one first."""
    return tuple(reload_status(model) for model in models_of(worker))


def weight_status(worker: Any) -> list[dict[str, Any]]:
    """Return the same as plain data: a `ReloadStatus` as fields for each model."""
    return [asdict(state) for state in weight_states(worker)]


def models_of(worker: Any) -> list[nn.Module]:
    """Return the models that a worker serves from: its own and the draft model."""
    runner = getattr(worker, "model_runner", None)
    getters = (getattr(runner, name, None) for name in ("get_model", "get_draft_model"))
    models = [getter() for getter in getters if getter is not None]
    return [model for model in models if isinstance(model, nn.Module)]


def results_of(replies: Sequence[WorkerReply], method: str | Callable) -> list[Any]:
    """Return what an RPC returned on each rank.

    Raises:
        Exception: what it raised, if the worker lives in this process.
        RpcFailedError: it raised on workers in other processes; the message says what,
            and on which ranks.

    """
    errors = {rank: reply.error for rank, reply in enumerate(replies) if reply.error}
    if not errors:
        return [reply.result for reply in replies]
    for error in errors.values():
        if isinstance(error, Exception):
            raise error
    raise RpcFailedError(
        f"The RPC {method} failed on {len(errors)} of {len(replies)} workers, whose "
        "stack traces are in the log above.",
        {
            rank: error
            for rank, error in errors.items()
            if isinstance(error, RpcFailure)
        },
    )
