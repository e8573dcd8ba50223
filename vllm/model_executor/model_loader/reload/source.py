# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A caller's weights, watched while a model iterates over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .calls import TensorSpec
from .errors import WeightSyncError
from .kept import KeptTensors
from .planned import PlannedCopies
from .routing import RouteRecorder

__all__ = ["Source", "Weights"]

Weights = Iterable[tuple[str, torch.Tensor]]


class Source:
    """Weights, of which those with routes go past the model.

    Args:
        weights: names and tensors. What is iterated over may change a tensor once it
            is asked for the next, and a list does not. A class of its own may, whatever
            it derives from.
        recorder: notes what the model does with the others.
        planned: stages those with routes.
        on_loaded: called after each that a loader was given, and when a staged tensor
            is complete.
        kept: notices what the model keeps of what it is given.

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
        kept: KeptTensors,
    ):
        self.name: str | None = None
        self.error: BaseException | None = None
        self._list: Sequence[tuple[str, torch.Tensor]] | None = None
        if isinstance(weights, list | tuple) and type(weights) in (list, tuple):
            self._list = weights
        self._place = 0  # in the list
        self._weights = iter(weights)
        self._recorder = recorder
        self._planned = planned
        self._on_loaded = on_loaded
        self._kept = kept
        self._tensor: torch.Tensor | None = None
        self._is_left = False
        self._lent: torch.Tensor | None = None

    def skip_planned(self) -> bool:
        """Stage the tensors with routes.

        Returns:
            Whether there is one without.

        """
        skip = self._skip_one if self._list is None else self._skip_in_list
        while skip():
            self._on_loaded()
        self._planned.copies.flush()
        if self._is_left:
            assert self.name is not None and self._tensor is not None
            self._lent = self._kept.lend(self.name, self._tensor)
        return self._is_left

    def _skip_in_list(self) -> bool:
        """Go on until a staged tensor is complete; false if that does not happen."""
        complete = self._planned.completed
        self._planned.copies.put_off = True
        # A default device, say, is a mode of its own, and costs more than a copy.
        with torch._C.DisableTorchFunction():
            while self._planned.completed == complete:
                if not self._take_from_list():
                    return False
        return True

    def _take_from_list(self) -> bool:
        """Stage a run, or else one tensor; false if none is left, or has a route."""
        assert self._list is not None
        start, self.name, self._tensor = self._place, None, None
        self._place = self._planned.take_run(self._list, start)
        if self._place > start:
            return True
        self._is_left = start < len(self._list)
        if not self._is_left:
            return False
        self._place += 1
        return self._take(self._list[start])

    def _skip_one(self) -> bool:
        self._is_left = False
        try:
            sent = next(self._weights)
        except StopIteration:
            return False
        except BaseException as error:
            self.error = error
            raise
        # Not before: what is iterated over may itself load a list.
        self._planned.copies.put_off = False
        with torch._C.DisableTorchFunction():
            return self._take(sent)

    def _take(self, sent: tuple[str, torch.Tensor]) -> bool:
        """Stage what was sent; false if it has no route. Nothing else ends a chunk."""
        self.name, self._tensor, self._is_left = None, None, True
        self.name, self._tensor = sent
        if not isinstance(self._tensor, torch.Tensor):
            raise TypeError(f"expected a tensor, got {type(self._tensor).__name__}")
        return self._planned.take(self.name, self._tensor)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        is_left = self._is_left
        while is_left:
            assert self.name is not None and self._tensor is not None
            self._recorder.begin(self.name, self._tensor)
            yield self.name, self._hand_over()
            self._recorder.end()
            self._on_loaded()
            # Not only paused: a mode costs more than a copy.
            with _disable_current_modes():
                is_left = self.skip_planned()

    def _hand_over(self) -> torch.Tensor:
        """What the model is given, which is held by nobody here from now on."""
        lent, self._lent = self._lent, None
        assert lent is not None
        return lent

    def explain(self, error: BaseException) -> WeightSyncError:
        """The error of a loader, in terms of the tensor that it was loading."""
        reason = str(error) or type(error).__name__
        spec = self._tensor is not None and TensorSpec.of(self._tensor)
        return WeightSyncError(
            f"weight sync cannot load {self.name} ({spec or 'no tensor'}): {reason}"
        )
