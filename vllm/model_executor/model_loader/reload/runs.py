# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs: tensors of a list that a sync takes together.

Trainers send the same tensors in the same order, sync after sync. So what follows from
their names and routes is kept with a run, and whether tensors are like those of then
torch tells of all of them in one call. A list that has one tensor under two names it
never takes for what came before; such a run is looked at anew each time.

n - tensors of a run
m - those of one kind
R - routes of a table
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .tensor_guards import guards_of

if TYPE_CHECKING:
    from .route_table import Kind, RouteTable

__all__ = ["Named", "Part", "Run"]

Named = tuple[str, torch.Tensor]


class Part(NamedTuple):
    """The tensors of a run that are of one kind.

    Attributes:
        kind: what their routes have in common.
        place_m: their places in the run, int64.
        number_m: numbers of their routes, int64.
        box_m: numbers of the boxes that they fill, int64.
        target_m: where they begin in the layer's tensor, in bytes, int64.
        numel: how many elements those boxes have, each counted once.

    """

    kind: Kind
    place_m: np.ndarray
    number_m: np.ndarray
    box_m: np.ndarray
    target_m: np.ndarray
    numel: int


class Run:
    """Tensors that follow each other in a list, and all have routes in one table.

    Args:
        table: the routes.
        numbers: of those of the tensors, in order.
        weights: the list; no tensor of it is kept.
        start: place of the first tensor there.

    Attributes:
        parts: the run, by kind.
        source_n: where each begins to be read, in bytes, int64.

    """

    def __init__(
        self,
        table: RouteTable,
        numbers: Sequence[int],
        weights: Sequence[Named],
        start: int,
    ):
        self._count = len(numbers)
        self._names, tensors = self._sent(weights, start)
        self._guards = guards_of(*tensors)
        number_n = np.array(numbers)
        self.source_n = table.source_R[number_n]
        kind_n = table.kind_R[number_n]
        self.parts: list[Part] = []
        for kind in np.unique(kind_n):
            place_m = np.flatnonzero(kind_n == kind)
            number_m = number_n[place_m]
            box_m, target_m = table.box_R[number_m], table.target_R[number_m]
            _, once = np.unique(box_m, return_index=True)
            numel = int(table.numel_R[number_m[once]].sum())
            columns = place_m, number_m, box_m, target_m
            part = Part(table.distinct[kind], *columns, numel)
            self.parts.append(part)

    def __len__(self) -> int:
        return self._count

    def is_like(self, weights: Sequence[Named], start: int) -> bool:
        """Whether the list goes on there as it did when this run was made.

        That is with tensors of the same names and forms, and what followed them.
        """
        names, tensors = self._sent(weights, start)
        return names == self._names and self._guards.check(*tensors)

    def is_named_like(self, weights: Sequence[Named], start: int) -> bool:
        """Whether the names are the same, whatever the tensors are."""
        return self._sent(weights, start)[0] == self._names

    def _sent(
        self, weights: Sequence[Named], start: int
    ) -> tuple[list[str], list[torch.Tensor]]:
        """Names of the run's tensors and of the one that follows, and the tensors."""
        sent = weights[start : start + self._count + 1]
        # Not by `zip`, which makes an iterator of each for the garbage collector.
        return [name for name, _ in sent], [each for _, each in sent[: self._count]]
