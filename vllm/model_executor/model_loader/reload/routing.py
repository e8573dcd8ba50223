# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Noting the routes of tensors while their loaders run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .calls import TensorSpec
from .ledger import Box
from .route import Copy, Route
from .view import View

if TYPE_CHECKING:
    from .staging import StagedTensor

__all__ = ["RouteRecorder", "tensors_in"]


class RouteRecorder:
    """Notes what loaders do with the tensor that they were given last.

        recorder.begin(name, tensor)    # before a loader sees it
        recorder.copied(...)            # each write to a staged tensor
        recorder.seen(...)              # each other operator
        recorder.end()                  # before the next

    A tensor has a route if every operator on it made a view, or copied one to a staged
    tensor. A loader may also have looked at it, or changed it: then it has none. Once a
    loader has used a tensor that it was given before, nothing has a route.

    Attributes:
        layers: how many tensors loaders were given, by the layer that was written
            first; None if none was.
        nowhere: names of those for which none was.

    """

    def __init__(self) -> None:
        self.layers: Counter[str | None] = Counter()
        self.nowhere: list[str] = []
        self._layer: str | None = None
        self._routes: dict[str, Route] = {}
        # Routes of the same spec share it, for the sake of the processor's cache.
        self._specs: dict[TensorSpec, TensorSpec] = {}
        self._writers: dict[tuple, str] = {}
        self._refused: set[str] = set()
        self._are_kept = False
        # Tensors that the model makes of others, and may make in spite of what came.
        self._made: set[tuple[str, str]] = set()
        self._name = ""
        self._is_direct = False
        self._tensor: torch.Tensor | None = None
        self._copies: list[Copy] = []
        self._derived: set[int] = set()

    @property
    def is_idle(self) -> bool:
        """Whether no loader was given a tensor just now."""
        return self._tensor is None and not self._is_direct

    @contextmanager
    def direct(self) -> Iterator[None]:
        """For a call of a loader by whoever sends, who says no name: no route."""
        self._is_direct = True
        try:
            yield
        finally:
            self._is_direct = False

    @property
    def count(self) -> int:
        """How many tensors loaders were given."""
        return self.layers.total()

    def begin(self, name: str, tensor: torch.Tensor) -> None:
        """A loader is about to be given a tensor."""
        self._name, self._tensor, self._layer = name, tensor, None
        self._copies, self._derived = [], set()
        if name in self._routes or not tensor.is_contiguous() or not tensor.numel():
            self._refused.add(name)

    def copied(
        self,
        target: StagedTensor,
        view: torch.Tensor,
        source: Any,
        boxes: tuple[Box, ...],
        staged: Container[int],
    ) -> None:
        """A staged tensor was written.

        Args:
            target: the tensor.
            view: the view of its memory that was written.
            source: what was copied there.
            boxes: the same as `view`.
            staged: storages of staged tensors.

        """
        tensor = self._tensor
        self._layer = target.layer if self._layer is None else self._layer
        if self._is_direct:
            return
        if tensor is None:
            # Given to the model before, unless it is another staged tensor's.
            is_staged = isinstance(source, torch.Tensor) and _storage(source) in staged
            self._are_kept |= not is_staged
            self._made.add(target.key)
        elif not isinstance(source, torch.Tensor):
            self.refuse()
        elif not self._is_current(source) or source.dtype != tensor.dtype:
            self.refuse()
            self._are_kept |= not self._is_mine(source)
        else:
            self._note(target, view, source, boxes)

    def _note(
        self,
        target: StagedTensor,
        view: torch.Tensor,
        source: torch.Tensor,
        boxes: tuple[Box, ...],
    ) -> None:
        assert self._tensor is not None
        part = View.of(source.expand(view.shape), self._tensor)
        key = target.key
        to = View.of(view, target.materialize())
        spec = TensorSpec.of(self._tensor)
        self._copies.append(Copy.of(key, part, to, boxes, spec, view.dtype))
        for box in boxes:
            other = self._writers.setdefault((key, box), self._name)
            if other != self._name or target.ledger.overlapping:
                self._refused |= {other, self._name}

    def seen(self, values: tuple, result: Any, staged: Container[int]) -> None:
        """An operator ran that makes no view, and writes to no staged tensor.

        Args:
            values: its arguments.
            result: what it returned.
            staged: storages of staged tensors.

        """
        if self._tensor is None:
            return
        tensors = list(tensors_in(values))
        others = [t for t in tensors if not self._is_mine(t)]
        is_staged = [_storage(t) in staged for t in others]
        if any(is_staged) or len(others) < len(tensors):
            self.refuse()
        if len(others) < len(tensors):
            self._derived |= {_storage(t) for t in tensors_in(result)}
            self._are_kept |= not all(is_staged)

    def refuse(self) -> None:
        """The current tensor must go through its loader."""
        self._refused.add(self._name)

    def end(self) -> None:
        """The loader is done with its tensor."""
        if self._tensor is not None:
            self.layers[self._layer] += 1
            if self._layer is None:
                self.nowhere.append(self._name)
            spec = TensorSpec.of(self._tensor)
            spec = self._specs.setdefault(spec, spec)
            self._routes[self._name] = Route(spec, tuple(self._copies))
        self._name, self._tensor = "", None

    def routes(self) -> dict[str, Route]:
        """What was recorded, by name.

        Of tensors that were copied nowhere only matrices have a route: what is smaller
        a loader may have read in ways that torch does not see.
        """
        if self._are_kept:
            return {}
        return {
            name: route
            for name, route in self._routes.items()
            if name not in self._refused
            and (route.copies or len(route.spec.shape) > 1)
            and self._made.isdisjoint(copy.tensor for copy in route.copies)
        }

    def _is_mine(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor comes from the current one alone."""
        return self._is_current(tensor) or _storage(tensor) in self._derived

    def _is_current(self, view: torch.Tensor) -> bool:
        """Whether a tensor is a view of the current one, which may be in a bucket."""
        tensor = self._tensor
        if tensor is None or _storage(view) != _storage(tensor):
            return False
        size = view.element_size()
        begin = view.storage_offset() * size
        extent = sum((n - 1) * s for n, s in zip(view.shape, view.stride())) * size
        start = tensor.storage_offset() * tensor.element_size()
        return start <= begin and begin + extent < start + tensor.nbytes


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among an operator's arguments or results."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
