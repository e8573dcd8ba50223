# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Experts stay where they are while new weights are loaded to where they are.

A weight sync may be open on some ranks and not yet, or no longer, on others. So whether
experts move is for all ranks to agree on, where they would have communicated anyway.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from vllm.distributed.parallel_state import get_ep_group
from vllm.logger import init_logger

__all__ = ["aborts_syncs", "held_during_syncs", "not_ready_during_syncs"]

logger = init_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
EplbMethod = Callable[Concatenate[Any, P], R]


def held_during_syncs(rearrange: Callable[..., R]) -> Callable[..., R | None]:
    """Wrap `EplbState.rearrange`: skip it while any rank has a sync open.

    A change of the number of ranks is not skipped; see `aborts_syncs`.
    """

    @wraps(rearrange)
    def held(
        state: Any,
        is_profile: bool = False,
        rank_mapping: dict[int, int] | None = None,
        **kwargs: Any,
    ) -> R | None:
        may_wait = not is_profile and rank_mapping is None
        if may_wait and _any_rank_syncs(state):
            logger.info("Experts are not rebalanced while a weight sync is open.")
            return None
        return rearrange(state, is_profile, rank_mapping, **kwargs)

    return held


def not_ready_during_syncs(ready: Callable[..., bool]) -> Callable[..., bool]:
    """Wrap `EplbState._all_ranks_result_ready`, which ranks agree on.

    Experts that are on their way to another place arrive after the sync.
    """

    @wraps(ready)
    def asked(state: Any, model_state: Any) -> bool:
        if _is_synced(model_state.model):
            model_state = replace(model_state, pending_result=None)
        return ready(state, model_state)

    return asked


def aborts_syncs(drain: EplbMethod[P, R]) -> EplbMethod[P, R]:
    """Wrap `EplbState.drain_async`, after which the number of ranks changes.

    Raises:
        RuntimeError: the sync is that of a larger model, which is not known here.

    """

    @wraps(drain)
    def drained(state: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        from vllm.model_executor.model_loader.reload import abort_layerwise_reload

        for each in state.model_states.values():
            abort_layerwise_reload(each.model, "the number of ranks changes")
            if _is_synced(each.model):
                raise RuntimeError("finish the weight sync before ranks come or go")
        return drain(state, *args, **kwargs)

    return drained


def _any_rank_syncs(state: Any) -> bool:
    synced = any(_is_synced(each.model) for each in state.model_states.values())
    flag = torch.tensor([int(synced)], dtype=torch.int32, device="cpu")
    group = get_ep_group().cpu_group
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group)
    return bool(flag.item())


def _is_synced(model: torch.nn.Module) -> bool:
    """Whether a sync of a model is open, or of a larger one that it is a part of."""
    # Model loaders import the experts, which import this.
    from vllm.model_executor.model_loader.reload.registry import get_layerwise_info

    infos = [get_layerwise_info(layer) for layer in model.modules()]
    # All layers may be committed, and still be rolled back.
    has_sync = (info.model and info.model.transaction for info in infos)
    return any(has_sync) or any(info.can_load() for info in infos)
