# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where each tensor of a checkpoint goes, so that the next sync needs no loader.

A sync that runs the loaders notes for each name which parts of the tensor were copied
where. If that is all that was done with it, it is the name's route, and a later tensor
of the same name, shape and type takes it. All others go through their loaders again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from weakref import ref

import torch

from .placement import ExpertPlacement, layers_with
from .route import Route
from .route_table import Owed, RouteTable

__all__ = ["Plan", "fingerprint", "loaded_by"]


@dataclass
class Plan:
    """The routes of a model, until it changes.

    Attributes:
        layout: what the routes were recorded for; see `fingerprint`.
        routes: by name.

    """

    layout: object = None
    routes: dict[str, Route] = field(default_factory=dict)
    _table: RouteTable | None = None
    _not_in_table: dict[str, Route] = field(default_factory=dict)

    # Made once, for all syncs that owe the same.
    def table_for(self, owed: Owed) -> RouteTable:
        """Return the table of the routes, for a sync that owes these boxes."""
        if self._table is None or not self._table.fits(owed):
            self._table = RouteTable(self.routes, owed)
        else:
            self._table.add(self._not_in_table, owed)
        self._not_in_table = {}
        return self._table

    def routes_for(self, layout: object) -> dict[str, Route]:
        """Return the routes, if they were recorded for this layout."""
        return self.routes if layout == self.layout else {}

    def take_over(self, routes: dict[str, Route], layout: object) -> None:
        """Add what a complete sync recorded."""
        if layout != self.layout:
            self.routes.clear()
            self._table = None
        self.layout = layout
        self.routes |= routes
        self._not_in_table |= routes


def fingerprint(
    modules: Mapping[str, torch.nn.Module],
    metas: Iterable[torch.Tensor],
    placements: Iterable[ExpertPlacement] = (),
) -> object:
    """What routes depend on besides the names.

    That is layers' tensors, expert maps, and what loads the model.

    Args:
        modules: all of a model, by qualified name.
        metas: its tensors in checkpoint format.
        placements: where its experts are, where they are balanced.

    Returns:
        A value that compares equal as long as nothing changed.

    """
    # A property may ask for what a layer that is not balanced does not have.
    holders = layers_with(modules.values(), "expert_map")
    maps = (getattr(layer, "expert_map", None) for layer in holders)
    local = [m.tolist() for m in maps if isinstance(m, torch.Tensor)]
    layouts = [(m.shape, m.stride(), m.dtype) for m in metas]
    return layouts, local, list(placements), loaded_by(modules[""])


def loaded_by(model: torch.nn.Module) -> object:
    """The function that loads a model's weights: its class's, or one put before it."""
    load_weights = getattr(model, "load_weights", None)
    function = getattr(load_weights, "__func__", load_weights)
    try:
        return None if function is None else ref(function)
    except TypeError:
        return object()  # nobody can tell whether it is the same one later
