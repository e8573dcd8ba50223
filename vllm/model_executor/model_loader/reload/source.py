# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A caller's weights, watched while a model iterates over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .calls import TensorSpec
from .errors import WeightSyncError
from .planned import PlannedCopies
from .routing import RouteRecorder

__all__ = ["Source", "Weights"]

Weights = Iterable[tuple[str, torch.Tensor]]


class Source:
    """Weights, of which those with routes go past the model.

    Args:
        weights: names and tensors. What is iterated over may change a tensor once it
            is asked for the next, and a list does not.
        recorder: notes what the model does with the others.
        planned: stages those with routes.
        on_loaded: called after each that a loader was given, and when a staged tensor
            is complete.

    Attributes:
        name: the checkpoint name that is being loaded.
        error: what the caller's iterator raised, if it did.

    """

    def __init__(
        self,
        weights: Weights,
        recorder: RouteRecorder,
        planned: PlannedCopies,
        on_loaded: Callable[[], None],
    ):
        self.name: str | None = None
        self.error: BaseException | None = None
        self._is_list = isinstance(weights, list | tuple)
        self._weights = iter(weights)
        self._recorder = recorder
        self._planned = planned
        self._on_loaded = on_loaded
        self._tensor: torch.Tensor | None = None

    def skip_planned(self) -> bool:
        """Stage the tensors with routes.

        Returns:
            Whether there is one without.

        """
        skip = self._skip_in_list if self._is_list else self._skip_one
        self._planned.copies.put_off = self._is_list
        while skip():
            self._on_loaded()
        self._planned.copies.flush()
        return self._tensor is not None

    def _skip_in_list(self) -> bool:
        """Go on until a staged tensor is complete; false if that does not happen."""
        complete = self._planned.completed
        # A default device, say, is a mode of its own, and costs more than a copy.
        with torch._C.DisableTorchFunction():
            for name, tensor in self._weights:
                self.name, self._tensor = name, tensor
                if not self._planned.take(name, tensor):
                    return False
                if self._planned.completed != complete:
                    return True
        self._tensor = None
        return False

    def _skip_one(self) -> bool:
        sent = self._next()
        if sent is None:
            self._tensor = None
            return False
        self.name, self._tensor = sent
        with torch._C.DisableTorchFunction():
            return self._planned.take(*sent)

    def _next(self) -> tuple[str, torch.Tensor] | None:
        try:
            return next(self._weights, None)
        except BaseException as error:
            self.error = error
            raise

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        is_left = self._tensor is not None
        while is_left:
            assert self.name is not None and self._tensor is not None
            self._recorder.begin(self.name, self._tensor)
            yield self.name, self._tensor
            self._recorder.end()
            self._on_loaded()
            # Not only paused: a mode costs more than a copy.
            with _disable_current_modes():
                is_left = self.skip_planned()

    def explain(self, error: BaseException) -> WeightSyncError:
        """The error of a loader, in terms of the tensor that it was loading."""
        reason = str(error) or type(error).__name__
        spec = self._tensor is not None and TensorSpec.of(self._tensor)
        return WeightSyncError(
            f"weight sync cannot load {self.name} ({spec or 'no tensor'}): {reason}"
        )
