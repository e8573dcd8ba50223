# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Routes of one copy, in columns: what a sync sends in a list, it takes in runs.

R - routes
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from vllm.model_executor.kernels.strided import Strided

from .ledger import Box
from .route import Copy, Route
from .runs import Run

__all__ = ["Kind", "Owed", "RouteTable"]

# Which boxes a staged tensor owes, and their numbers; by layer and name.
Owed = Mapping[tuple[str, str], Mapping[Box, int]]


class Kind(NamedTuple):
    """What many routes have in common, such as those of a layer's gates.

    Attributes:
        shape: of a checkpoint's tensor.
        dtype: its type.
        layer: name of the layer that it is copied to; None if it is copied nowhere.
        tensor: names of the layer and of its tensor.
        layout: what a kernel needs to know of the copy.

    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: str | None = None
    tensor: tuple[str, str] | None = None
    layout: Strided | None = None


class RouteTable:
    """Those routes that fill one owed box by one strided copy, or copy nothing.

    Args:
        routes: by checkpoint name.
        owed: what the tensors of the model owe.

    Attributes:
        numbers: of the routes in this table, by checkpoint name.
        kinds: the kind of each route.
        copies: the copy of each route.
        kind_R: the place of its kind in `distinct`, int64.
        box_R: number of the box that it fills, int64.
        numel_R: how many elements that has, int64.
        source_R: where it begins to read in a checkpoint's tensor, in bytes, int64.
        target_R: where it begins to write in a layer's, in bytes, int64.
        distinct: each kind once.
        runs: what the last sync took together, by the name that it began with.

    """

    def __init__(self, routes: Mapping[str, Route], owed: Owed):
        self._owed: dict[tuple[str, str], Mapping[Box, int]] = {}
        self._places: dict[Kind, int] = {}
        self._columns_5R = np.empty((5, 0), dtype=np.int64)
        self.numbers: dict[str, int] = {}
        self.kinds: list[Kind] = []
        self.copies: list[Copy | None] = []
        self.distinct: list[Kind] = []
        self.runs: dict[str, Run] = {}
        self.add(routes, owed)

    def add(self, routes: Mapping[str, Route], owed: Owed) -> None:
        """Add routes, each in place of an earlier one of its name."""
        rows: list[tuple[int, ...]] = []
        if routes.keys() & self.numbers.keys():
            self.runs = {}  # what one of them knows of a name may be wrong now
        for name, route in routes.items():
            self.numbers.pop(name, None)
            row = self._row(route, owed)
            if row is not None:
                kind, *columns = row
                place = self._places.setdefault(kind, len(self._places))
                if place == len(self.distinct):
                    self.distinct.append(kind)
                self.numbers[name] = len(self.kinds)
                self.kinds.append(self.distinct[place])
                rows.append((place, *columns))
        added_5R = np.array(rows, dtype=np.int64).reshape(-1, 5).T
        self._columns_5R = np.hstack([self._columns_5R, added_5R])
        self.kind_R, self.box_R, self.numel_R = self._columns_5R[:3]
        self.source_R, self.target_R = self._columns_5R[3:]

    def _row(self, route: Route, owed: Owed) -> tuple[Kind, int, int, int, int] | None:
        """Kind and numbers of a route; None if it is none of this table."""
        if not route.copies:
            self.copies.append(None)
            return Kind(route.spec.shape, route.spec.dtype), 0, 0, 0, 0
        copy = route.copies[0]
        numbers = owed.get(copy.tensor, {})
        if len(route.copies) + len(copy.boxes) > 2 or copy.layout is None:
            return None
        number = numbers.get(copy.boxes[0])
        if number is None:
            return None
        self._owed[copy.tensor] = numbers
        self.copies.append(copy)
        spec, layer = route.spec, copy.tensor[0]
        kind = Kind(spec.shape, spec.dtype, layer, copy.tensor, copy.layout)
        numel = copy.boxes[0].numel
        return kind, number, numel, copy.source_bytes, copy.target_bytes

    def take_runs(self) -> dict[str, Run]:
        """Return the runs of the last sync, and keep none of them."""
        taken, self.runs = self.runs, {}
        return taken

    def fits(self, owed: Owed) -> bool:
        """Whether the same boxes are owed, by the same numbers."""
        return all(
            known is owed.get(tensor) or known == owed.get(tensor)
            for tensor, known in self._owed.items()
        )
