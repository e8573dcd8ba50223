# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A worker's weight update session, from start to finish, on all ranks or on none.

Each decorator here wraps one RPC of the worker. At the end of each RPC all ranks agree
on whether it succeeded. If it failed anywhere, every rank drops the open sync and its
session, and the next one may start.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    abort_layerwise_reload,
    mark_inconsistent,
)
from vllm.model_executor.model_loader.reload.agreement import agree_across_ranks
from vllm.model_executor.model_loader.reload.errors import (
    SyncConflictError,
    TransferMissingError,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    prepare_layerwise_reload,
    take_reach,
    tensors_sent,
)
from vllm.v1.worker.reload_source import source_kept, source_named
from vllm.v1.worker.weight_report import models_of

__all__ = [
    "abort_session",
    "check_configured",
    "check_per_rank",
    "continues_session",
    "drops_weights",
    "finishes_session",
    "loses_weights",
    "opens_session",
    "outside_sessions",
    "prepare_weight_update",
    "reloads_at_once",
    "session_reach",
]

P = ParamSpec("P")
R = TypeVar("R")
WorkerRpc = Callable[Concatenate[Any, P], R]


def opens_session(start: WorkerRpc[P, R]) -> WorkerRpc[P, R]:
    """Wrap the RPC that starts a session.

    Started while another session is open it fails, and that one stays open.
    """

    @wraps(start)
    def agreed(worker: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        with _on_all_ranks(worker, closes=not worker._weight_update_active):
            _check_none_open(worker)
            for model in models_of(worker):
                take_reach(model)
            return start(worker, *args, **kwargs)

    return agreed


def continues_session(step: WorkerRpc[P, R]) -> WorkerRpc[P, R]:
    """Wrap an RPC that needs an open session: a chunk, and see `finishes_session`.

    Without one it fails, and leaves alone what was opened past the engine's API.
    """

    @wraps(step)
    def agreed(worker: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        with _on_all_ranks(worker, closes=worker._weight_update_active):
            if not worker._weight_update_active:
                raise SyncConflictError(
                    f"{step.__name__} came without a matching start: no weight update "
                    "is open, start_weight_update must be called first"
                )
            return step(worker, *args, **kwargs)

    return agreed


def finishes_session(finish: WorkerRpc[P, R]) -> WorkerRpc[P, R]:
    """Wrap the RPC that finishes a session.

    One that has brought nothing fails: it is rather a trainer's mistake than its wish
    to leave all as it is. A part of a model is a sync like any other.
    """

    @continues_session
    @wraps(finish)
    def checked(worker: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        if 0 in map(tensors_sent, models_of(worker)):
            raise WeightSyncError(
                "weight sync brought no tensor; send them by update_weights"
            )
        return finish(worker, *args, **kwargs)

    return checked


@finishes_session
def prepare_weight_update(worker: Any) -> None:
    """Do all of finishing that can be refused; see `takes_all_replicas_or_none`."""
    own = worker.vllm_config.model_config
    # Where engines know it, that of the draft model if the session is about it.
    config = getattr(worker.weight_transfer_engine, "model_config", own)
    with set_current_vllm_config(worker.vllm_config), torch.device(worker.device):
        for model in models_of(worker):
            prepare_layerwise_reload(model, config)


def session_reach(worker: Any) -> dict[str, tuple[str, ...]] | None:
    """Return what the last session updated and what it kept, as in `SyncReach`.

    Returns:
        Names of parameters by "updated" and "kept"; None if it did not load them the
        way that checkpoints are loaded.

    """
    reaches = [take_reach(model) for model in models_of(worker)]
    return next((asdict(reach) for reach in reaches if reach is not None), None)


def abort_session(worker: Any) -> None:
    """Drop the open session, if there is one."""
    if worker._weight_update_active:
        _close(worker, "the weight update was aborted")


def check_configured(engine: Any) -> None:
    """Check that a worker has a weight transfer engine.

    Raises:
        TransferMissingError: it has none.

    """
    if engine is None:
        raise TransferMissingError(
            "Weight transfer not configured; start the server with "
            """--weight-transfer-config, such as '{"backend": "shm"}'"""
        )


def check_per_rank(update_info: Any, worker: Any) -> None:
    """Check that a list of update infos has one for each rank.

    A replica of a dense model does not know how many replicas there are.

    Args:
        update_info: one update info for all ranks, or a list of them.
        worker: the worker, which knows its rank and how its replica is parallel.

    Raises:
        ValueError: the list has none for this rank, or not as many for each replica.

    """
    if not isinstance(update_info, list):
        return
    parallel = worker.vllm_config.parallel_config
    size, place = parallel.world_size, parallel.data_parallel_index
    if len(update_info) % size or len(update_info) <= place * size + worker.rank:
        raise ValueError(
            f"expected one update_info for all ranks, or a list with one for each of "
            f"{size} in each replica, got a list of {len(update_info)} in replica "
            f"{place}"
        )


def outside_sessions(rpc: WorkerRpc[P, R]) -> WorkerRpc[P, R]:
    """Wrap an RPC that would take an open session's engine away."""

    @wraps(rpc)
    def checked(worker: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        _check_none_open(worker)
        return rpc(worker, *args, **kwargs)

    return checked


def reloads_at_once(reload: WorkerRpc[P, R]) -> WorkerRpc[P, R]:
    """Wrap an RPC that is a whole weight sync by itself.

    While a session is open it fails, and that one stays open. When it fails on any
    rank, the next one that names no checkpoint reads the one that it would have read
    before.
    """

    @wraps(reload)
    def agreed(worker: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        _check_none_open(worker)
        with (
            source_kept(worker),
            _on_all_ranks(worker, closes=True),
            source_named(worker),
        ):
            return reload(worker, *args, **kwargs)

    return agreed


def drops_weights(sleep: WorkerRpc[P, R]) -> WorkerRpc[P, R]:
    """Wrap `sleep(level)`, which at level 2 throws the weights away."""

    @wraps(sleep)
    def marked(worker: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        result = sleep(worker, *args, **kwargs)
        level = args[0] if args else kwargs.get("level", 1)
        if level == 2:
            _mark_dropped(worker)
        return result

    return marked


def loses_weights(reset: WorkerRpc[P, R]) -> WorkerRpc[P, R]:
    """Wrap `reset_weights`, which fills the weights that serve with zeros.

    While a session is open it fails: the session may have committed some of them.
    """

    @wraps(reset)
    def marked(worker: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        _check_none_open(worker)
        model = worker.model_runner.get_model()
        mark_inconsistent(model, "weight_checker has reset the weights to zeros")
        return reset(worker, *args, **kwargs)

    return marked


@contextmanager
def _on_all_ranks(worker: Any, closes: bool) -> Iterator[None]:
    """Agree on a block across ranks; if it failed anywhere, close the session here."""
    try:
        with agree_across_ranks():
            yield
    except BaseException as error:
        if closes:
            _close(worker, f"{type(error).__name__}: {error}", error)
        raise


def _check_none_open(worker: Any) -> None:
    if worker._weight_update_active:
        raise SyncConflictError(
            "a weight update is open already, and this is not done during a weight "
            "update; end it with finish_weight_update, or with abort_weight_update if "
            "its trainer is gone"
        )


def _close(worker: Any, reason: str, error: BaseException | None = None) -> None:
    for model in models_of(worker):
        abort_layerwise_reload(model, reason, error)
    if not worker._weight_update_active:
        return
    worker._weight_update_active = False
    # Before 0.32 there is no draft model to aim an update at, and nothing to reset.
    reset = getattr(worker.weight_transfer_engine, "reset_weight_update_target", None)
    if reset is not None:
        reset()


def _mark_dropped(worker: Any) -> None:
    """Mark the models whose weights a level 2 sleep dropped.

    It keeps parameters in host memory, and on 0.32 also those that the configuration
    names. Only a worker that kept them all still has valid weights.
    """
    models = models_of(worker)
    owned = {id(p) for model in models for p in model.parameters() if not p.is_cpu}
    if len(getattr(worker, "_sleep_saved_parameters", ())) < len(owned):
        for model in models:
            mark_inconsistent(
                model, "a level 2 sleep dropped the weights", fenced=False
            )
