# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Staging tensors along their routes, past the model and its loaders.

n - tensors of a run
m - those of one kind
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter

import numpy as np
import torch

from .copying import Copies
from .route import PLAIN_DISPATCH, Route
from .route_table import RouteTable
from .runs import Named, Part, Run
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
        limit: bytes of layers after which a run goes on with no other layer.

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
        # One that does not come again is forgotten.
        self._known = self._table.take_runs()
        self._limit = limit
        self._tensors = {tensor.key: tensor for tensor in tensors}
        self._sizes: defaultdict[str, int] = defaultdict(int)
        for tensor in self._tensors.values():
            self._sizes[tensor.layer] += tensor.meta.nbytes
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
            staged.planned = True
            self._note_complete(staged)
        self.layers[route.copies[0].tensor[0] if route.copies else None] += 1
        return True

    def take_run(self, weights: Sequence[Named], start: int) -> int:
        """Stage tensors of a list, up to where a layer may be complete.

        Does what `take` does with each of them; the Python that all of them need is run
        once for each kind.

        Args:
            weights: names and tensors.
            start: the first to stage.

        Returns:
            The first that is not staged: one that is another layer's, or for `take`.

        """
        run = self._run_at(weights, start)
        if run is None:
            return start
        stop = start + len(run)
        self._stage_run(run, weights[start:stop])
        return stop

    def _run_at(self, weights: Sequence[Named], start: int) -> Run | None:
        """The run that begins there, as known from the last sync or looked for."""
        if start == len(weights):
            return None
        first, _ = weights[start]
        if first not in self._table.numbers:
            return None
        run = self._known.get(first)
        if run is None or not run.is_like(weights, start):
            numbers = self._numbers_at(weights, start)
            if not numbers:
                return None
            run = Run(self._table, numbers, weights, start)
        self._table.runs[first] = run
        return run

    def _is_known(self, weights: Sequence[Named], place: int, taken: int) -> bool:
        """Whether a run seems to begin there that need not be looked at again.

        One that is no longer than what was taken before it is: where lists are cut at
        other places in each sync, there would be ever more runs, and shorter ones.
        """
        run = self._known.get(weights[place][0])
        if run is None or len(run) <= taken:
            return False
        return run.is_named_like(weights, place)

    def _numbers_at(self, weights: Sequence[Named], start: int) -> list[int]:
        """Numbers of the routes of a run that begins there.

        Only what has to be asked of each tensor stands in the loop.
        """
        number_of, kinds = self._table.numbers.get, self._table.kinds
        numbers: list[int] = []
        current, size = None, 0
        device = weights[start][1].get_device()
        for place in range(start, len(weights)):
            name, tensor = weights[place]
            number = number_of(name)
            taken = len(numbers)
            if number is None or taken and self._is_known(weights, place, taken):
                break
            shape, dtype, layer, _, _ = kinds[number]
            if (
                tensor.shape != shape
                or tensor.dtype is not dtype
                or not tensor.is_contiguous()
                or tensor.get_device() != device
                or type(tensor).__torch_dispatch__ is not PLAIN_DISPATCH
                or tensor.is_neg()
            ):
                break
            if layer != current and layer is not None:
                if size > self._limit:
                    break
                current = layer
                size += self._sizes[layer]  # also where the run begins with its end
            numbers.append(number)
        return numbers

    def _stage_run(self, run: Run, weights: Sequence[Named]) -> None:
        begins = map(torch.Tensor.data_ptr, map(itemgetter(1), weights))
        source_n = np.fromiter(begins, np.int64, len(run)) + run.source_n
        for part in run.parts:
            if part.kind.tensor is None:
                self.layers[None] += len(part.place_m)
            elif not self._stage_part(part, weights, source_n[part.place_m]):
                for place in part.place_m:
                    self.take(*weights[place])

    def _stage_part(
        self, part: Part, weights: Sequence[Named], source_m: np.ndarray
    ) -> bool:
        """Stage the tensors of one kind; false if they have to be taken one by one."""
        kind = part.kind
        assert kind.tensor is not None and kind.layout is not None
        staged = self._tensors[kind.tensor]
        if staged.closed:
            return False
        is_all = part.numel == staged.meta.numel()
        memory = staged.materialize(uninitialized=is_all)
        # All tensors of a run are on one device.
        if weights[0][1].get_device() != memory.get_device():
            return False
        if not staged.ledger.write_owed(part.box_m, part.numel):
            return False
        if self.copies.can_wait:
            target_m = memory.data_ptr() + part.target_m
            self.copies.add_run(kind.tensor, kind.layout, target_m, source_m)
        else:
            for number, place in zip(part.number_m, part.place_m):
                self.copies.add(self._table.copies[number], weights[place][1], memory)
        self.layers[kind.layer] += len(part.place_m)
        staged.planned = True
        self._note_complete(staged)
        return True

    def _note_complete(self, staged: StagedTensor) -> None:
        if staged.ledger.complete:
            self.completed += 1
            self._on_complete(staged)
