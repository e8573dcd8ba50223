# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where experts are once load balancing has moved them.

Models load their experts to the places that these had when the model was created. Load
balancing swaps weights between places and tells the router, but not the loaders.

    L - experts of a checkpoint
    R - places that one of them may have at most
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import WeightSyncError

__all__ = ["ExpertPlacement", "expert_placements", "layers_with"]


@dataclass(frozen=True)
class ExpertPlacement:
    """The places of a layer's experts.

    Attributes:
        places: of each expert of the checkpoint; numbers count over all ranks.

    """

    places: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, places: torch.Tensor) -> ExpertPlacement:
        """Read [L, R] integers, of which negative ones are no places."""
        return cls(tuple(tuple(p for p in row if p >= 0) for row in places.tolist()))

    def load(
        self, loader: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Call an expert's loader for the places where that expert is now.

        At first expert i is at place i, and places from L on hold second copies. So a
        call for one of the first L places names an expert, and is made for each of its
        places; calls for the others have nothing left to do.

        Example, of 3 experts and 4 places, where places = ((2,), (0, 3), (1,)):

            loader(..., expert_id=1)    # calls the loader for 0 and for 3
            loader(..., expert_id=3)    # does nothing

        Returns:
            What the loader returns; True if any of the places is on this rank.

        Raises:
            WeightSyncError: the call is for all experts of the rank, as they were at
                first.

        """
        call = inspect.signature(loader).bind(*args, **kwargs)
        expert = call.arguments.get("expert_id")
        if expert is None:
            return loader(*args, **kwargs)
        is_fused = getattr(call.arguments.get("loaded_weight"), "ndim", 0) > 2
        if is_fused and any(row != (i,) for i, row in enumerate(self.places)):
            raise WeightSyncError(
                "load balancing has moved experts, which the model loads all at once "
                "to where they were; send them one by one, or load the checkpoint anew"
            )
        loaded = []
        for place in self.places[expert] if expert < len(self.places) else ():
            call.arguments["expert_id"] = place
            loaded.append(loader(*call.args, **call.kwargs))
        return any(loaded) if call.arguments.get("return_success") else None


def expert_placements(
    modules: Mapping[str, torch.nn.Module],
) -> dict[torch.nn.Module, ExpertPlacement]:
    """Return the placements of layers whose experts are balanced, by layer.

    A layer's parameters may be a child's.

    Args:
        modules: all of a model, by qualified name.

    """
    placements: dict[torch.nn.Module, ExpertPlacement] = {}
    for layer in layers_with(modules.values(), "eplb_state"):
        state = getattr(layer, "eplb_state", None)
        places = getattr(state, "logical_to_physical_map", None)
        if isinstance(places, torch.Tensor):
            placement = ExpertPlacement.of(places)
            placements |= dict.fromkeys((layer, *layer.children()), placement)
    return placements


def layers_with(
    modules: Iterable[torch.nn.Module], name: str
) -> Iterator[torch.nn.Module]:
    """Those modules that have an attribute, which is no parameter and no child.

    Most have none, and take long to say so.
    """
    for layer in modules:
        own = name in vars(layer) or name in layer._buffers
        if own or hasattr(type(layer), name):
            yield layer
