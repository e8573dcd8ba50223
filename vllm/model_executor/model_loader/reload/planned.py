# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Staging tensors along their routes, past the model and its loaders.

n - tensors of a run
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from .copying import Copies
from .route import PLAIN_DISPATCH, Route
from .route_table import Kind, RouteTable
from .staging import StagedTensor

__all__ = ["PlannedCopies"]


class PlannedCopies:
    """Copies what has a route to where it goes.

    Args:
        routes: by checkpoint name.
        tensors: the staged tensors of this sync.
        on_complete: called for each staged tensor of which all that is owed is there.
        copies: how to copy; at once by default.
        table: those routes that tensors may take in runs; see `take_run`.
        limit: bytes of small layers that one run may fill.

    Attributes:
        routes: by checkpoint name.
        completed: how many writes left a staged tensor complete.
        copies: those to staged memory, which may have been put off.
        layers: how many tensors went to each layer, the first one each; or to none.

    """

    def __init__(
        self,
        routes: dict[str, Route],
        tensors: Iterable[StagedTensor],
        on_complete: Callable[[StagedTensor], None],
        copies: Copies | None = None,
        table: RouteTable | None = None,
        limit: float = 0,
    ):
        self.completed = 0
        self.copies = copies or Copies()
        self.routes = routes
        self.layers: Counter[str | None] = Counter()
        self._table = table or RouteTable({}, {})
        self._limit = limit
        self._tensors = {tensor.key: tensor for tensor in tensors}
        self._on_complete = on_complete

    @property
    def taken(self) -> int:
        """How many tensors came this way."""
        return self.layers.total()

    def take(self, name: str, tensor: torch.Tensor) -> bool:
        """Stage a tensor, see `copies`; false if it has to go through its loader.

        Raises:
            WeightSyncError: its layer is committed, and it holds other values.

        """
        route = self.routes.get(name)
        if route is None or not route.fits(tensor):
            return False
        if tensor.requires_grad:
            tensor = tensor.detach()
        for copy in route.copies:
            staged = self._tensors[copy.tensor]
            if staged.closed:
                source = tensor if copy.source is None else copy.source.on(tensor)
                staged.check_repeated(copy.target.on(staged.meta), source)
                continue
            self.copies.add(copy, tensor, staged.materialize())
            staged.ledger.write(*copy.boxes)
            self._note_complete(staged)
        self.layers[route.copies[0].tensor[0] if route.copies else None] += 1
        return True

    def take_run(self, weights: Sequence[tuple[str, torch.Tensor]], start: int) -> int:
        """Stage tensors of a list, up to where a layer may be complete.

        Does what `take` does with each of them; the Python that all of them need is run
        once for each kind. Only what is looked at one by one stands in the loop.

        Args:
            weights: names and tensors.
            start: the first to stage.

        Returns:
            The first that is not staged: one that is another layer's, or for `take`.

        """
        number_of, kinds = self._table.numbers.get, self._table.kinds
        numbers: list[int] = []
        sources: list[int] = []
        current, size, stop = None, 0, start
        for stop in range(start, len(weights)):
            name, tensor = weights[stop]
            number = number_of(name)
            if number is None:
                break
            shape, dtype, layer, nbytes, _, _ = kinds[number]
            if (
                tensor.shape != shape
                or tensor.dtype is not dtype
                or not tensor.is_contiguous()
                or type(tensor).__torch_dispatch__ is not PLAIN_DISPATCH
            ):
                break
            if layer != current and layer is not None:
                if size > self._limit:
                    break
                current = layer
            size += nbytes
            numbers.append(number)
            sources.append(tensor.data_ptr())
        else:
            stop = len(weights)
        if numbers:
            self._stage_run(weights[start:stop], np.array(numbers), np.array(sources))
        return stop

    def _stage_run(
        self,
        weights: Sequence[tuple[str, torch.Tensor]],
        number_n: np.ndarray,
        source_n: np.ndarray,
    ) -> None:
        """Stage tensors of known routes, which begin at these addresses."""
        table = self._table
        source_n = source_n + table.source_R[number_n]
        kind_n = table.kind_R[number_n]
        for place in np.unique(kind_n):
            kind, at = table.distinct[place], np.flatnonzero(kind_n == place)
            if kind.tensor is None:
                self.layers[None] += len(at)
            elif not self._stage_kind(kind, weights, at, number_n, source_n):
                for i in at:
                    self.take(*weights[i])

    def _stage_kind(
        self,
        kind: Kind,
        weights: Sequence[tuple[str, torch.Tensor]],
        at: np.ndarray,
        number_n: np.ndarray,
        source_n: np.ndarray,
    ) -> bool:
        """Stage the tensors of one kind; false if they have to be taken one by one."""
        assert kind.tensor is not None and kind.layout is not None
        staged, table = self._tensors[kind.tensor], self._table
        numbers = number_n[at]
        if staged.closed:
            return False
        memory = staged.materialize()
        if {weights[i][1].get_device() for i in at} != {memory.get_device()}:
            return False
        if not staged.ledger.write_owed(table.box_R[numbers]):
            return False
        if self.copies.can_wait:
            targets = memory.data_ptr() + table.target_R[numbers]
            self.copies.add_run(kind.layout, targets, source_n[at])
        else:
            for number, i in zip(numbers, at):
                self.copies.add(table.copies[number], weights[i][1], memory)
        self.layers[kind.layer] += len(at)
        self._note_complete(staged)
        return True

    def _note_complete(self, staged: StagedTensor) -> None:
        if staged.ledger.complete:
            self.completed += 1
            self._on_complete(staged)
