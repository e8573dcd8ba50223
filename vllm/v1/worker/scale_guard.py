# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What becomes of a bad weight scale that a kernel meets in a step.

Kernels record it in memory of this process, so a look takes about a microsecond and
does not wait for the GPU. What was recorded in a step is there when the step's output
is.

    worker alone in the engine core's process: the core looks when it has a step's
        output, drops that output, and the fence goes up; a complete sync lifts it
    any other worker: it looks at the end of its part of a step, and its process ends.
        Its peers may be waiting for it, and only one of them is heard by the core; that
        a process ended is seen by all
"""

from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.scale_check import ScaleCheck
from vllm.model_executor.layers.fused_moe.scale_watch import BadScale, scale_watch
from vllm.model_executor.model_loader.reload import mark_inconsistent, reload_status
from vllm.model_executor.model_loader.served_scales import ServedScale, find_scale
from vllm.v1.worker.weight_report import models_of

__all__ = ["ScaleGuard", "ends_on_bad_scale", "forget_bad_scales", "guard_of"]

logger = init_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class ScaleGuard:
    """Looks for bad scales that kernels met on a worker's device.

        reason = guard.look()   # after each step; if not None, fail what it served
        guard.forget()          # once new weights serve

    Args:
        worker: the worker.

    Attributes:
        is_core_looking: whether the engine core is in this process, without other
            workers, and looks itself.

    """

    def __init__(self, worker: Any):
        backend = worker.parallel_config.distributed_executor_backend
        self.is_core_looking = backend == "uni"
        self._worker = worker
        self._check = ScaleCheck.from_environment()
        self._watch = None
        if self._check is not ScaleCheck.OFF:
            self._watch = scale_watch(worker.device)
        self._seen: Counter[tuple[int, int]] = Counter()
        self._met = 0

    @property
    def is_off(self) -> bool:
        """Whether there is nothing to look at."""
        return self._watch is None

    def look(self) -> str | None:
        """Answer a bad scale as VLLM_MOE_SCALE_CHECK says.

        Returns:
            Why the model's weights must not be served any more, if so; the model is
            then marked as inconsistent.

        """
        if self._watch is None or (bad := self._watch.poll()) is None:
            return None
        models = models_of(self._worker)
        if not any(map(_has_weights, models)):
            return None  # dummy weights, whose scales are anything
        self._watch.reset()
        self._met += 1
        if self._check is ScaleCheck.RAISE:
            return _condemn(models, bad)
        self._warn(models, bad)
        return None

    def take_met(self) -> int:
        """In how many steps bad scales were met, since this was asked last."""
        met, self._met = self._met, 0
        return met

    def forget(self) -> None:
        """Forget what was met in weights that serve no more."""
        self._seen.clear()
        if self._watch is not None:
            self._watch.reset()

    def _warn(self, models: list[torch.nn.Module], bad: BadScale) -> None:
        place = bad.address, bad.expert
        self._seen[place] += 1
        if self._seen[place] == 1:
            logger.warning(
                "%s (%d such places so far, met in %d steps)",
                _describe(find_scale(models, bad), bad),
                len(self._seen),
                self._seen.total(),
            )


def guard_of(executor: Any) -> ScaleGuard | None:
    """The guard that an engine core has to look at; None if there is none."""
    worker = getattr(executor, "driver_worker", None)
    guard = getattr(worker, "scale_guard", None)
    if guard is None or guard.is_off or not guard.is_core_looking:
        return None
    return guard


def forget_bad_scales(worker: Any) -> int:
    """An RPC for after a sync: what kernels met is in the weights no more.

    Returns:
        In how many steps they met it, as far as nobody has taken that.

    """
    guard = getattr(worker, "scale_guard", None)
    if guard is None:
        return 0
    guard.forget()
    return guard.take_met()


def ends_on_bad_scale(
    step: Callable[Concatenate[Any, P], R],
) -> Callable[Concatenate[Any, P], R]:
    """Wrap a worker's part of a step, in an engine of several processes.

    Raises:
        SystemExit: a kernel met a bad scale; no exception that a worker's loop would
            log and forget.

    """

    @wraps(step)
    def watched(worker: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        output = step(worker, *args, **kwargs)
        guard = worker.scale_guard
        if not guard.is_core_looking and (reason := guard.look()) is not None:
            logger.error("This worker ends, and its engine with it: %s", reason)
            raise SystemExit(1)
        return output

    return watched


def _has_weights(model: torch.nn.Module) -> bool:
    return reload_status(model).state != "inconsistent"


def _condemn(models: list[torch.nn.Module], bad: BadScale) -> str | None:
    """Mark the model of a bad scale as inconsistent, unless it is already."""
    scale = find_scale(models, bad)
    model = models[0] if scale is None else scale.model
    if not _has_weights(model):
        return None
    reason = _describe(scale, bad)
    mark_inconsistent(model, reason)
    return reason


def _describe(scale: ServedScale | None, bad: BadScale) -> str:
    if scale is not None:
        return f"a kernel met a bad weight scale: {scale.describe(bad)}"
    return (
        f"a kernel met a bad weight scale, in a tensor at {bad.address:#x} that is no "
        f"parameter or buffer of the model: expert {bad.expert} of this rank, block "
        f"[{bad.block_n}, {bad.block_k}]"
    )
