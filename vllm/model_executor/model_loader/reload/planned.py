# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Staging tensors along their routes, past the model and its loaders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch

from .copying import Copies
from .plan import Route
from .staging import StagedTensor

__all__ = ["PlannedCopies"]


class PlannedCopies:
    """Copies what has a route to where it goes.

    Args:
        routes: by checkpoint name.
        tensors: the staged tensors of this sync.
        on_complete: called for each staged tensor of which all that is owed is there.
        copies: how to copy; at once by default.

    Attributes:
        routes: by checkpoint name.
        completed: how many writes left a staged tensor complete.
        copies: those to staged memory, which may have been put off.

    """

    def __init__(
        self,
        routes: dict[str, Route],
        tensors: Iterable[StagedTensor],
        on_complete: Callable[[StagedTensor], None],
        copies: Copies | None = None,
    ):
        self._taken: list[Route] = []
        self.completed = 0
        self.copies = copies or Copies()
        self.routes = routes
        self._tensors = {tensor.key: tensor for tensor in tensors}
        self._on_complete = on_complete

    @property
    def taken(self) -> int:
        """How many tensors came this way."""
        return len(self._taken)

    def layers(self) -> Counter[str | None]:
        """How many tensors went to each layer, the first one each; or to none."""
        copies = (route.copies for route in self._taken)
        return Counter(parts[0].tensor[0] if parts else None for parts in copies)

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
            memory = staged.memory
            if memory is None:
                memory = staged.materialize()
            self.copies.add(copy, tensor, memory)
            ledger = staged.ledger
            ledger.write(*copy.boxes)
            if ledger.complete:
                self.completed += 1
                self._on_complete(staged)
        self._taken.append(route)
        return True
