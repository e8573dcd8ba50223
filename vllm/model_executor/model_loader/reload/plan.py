# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where each tensor of a checkpoint goes, so that the next sync needs no loader.

A sync that runs the loaders notes for each name which parts of the tensor were copied
where. If that is all that was done with it, it is the name's route, and a later tensor
of the same name, shape and type takes it. All others go through their loaders again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from vllm.model_executor.kernels.strided import Strided

from .calls import TensorSpec
from .ledger import Box
from .placement import ExpertPlacement
from .view import View

__all__ = ["Copy", "Plan", "Route", "fingerprint"]

_PLAIN = torch.Tensor.__torch_dispatch__


@dataclass(frozen=True, slots=True)
class Copy:
    """A part of a checkpoint's tensor, and where a layer wants it.

    Attributes:
        tensor: names of the layer and of its tensor.
        source: part of the checkpoint's tensor; None for all of it.
        target: part of the layer's tensor in checkpoint format.
        boxes: the same as boxes.
        layout: what a kernel needs to know of it; None if it casts, or is no strided
            copy.
        source_bytes: where the part begins in the checkpoint's tensor.
        target_bytes: where it begins in the layer's.

    """

    tensor: tuple[str, str]
    source: View | None
    target: View
    boxes: tuple[Box, ...]
    layout: Strided | None
    source_bytes: int
    target_bytes: int

    @classmethod
    def of(
        cls,
        tensor: tuple[str, str],
        source: View,
        target: View,
        boxes: tuple[Box, ...],
        spec: TensorSpec,
        dtype: torch.dtype,
    ) -> Copy:
        """Describe a copy from a tensor of some shape and type to one of a type."""
        size = dtype.itemsize
        layout = None
        if spec.dtype == dtype:
            layout = _strided(target.shape, source.stride, target.stride, size)
        offsets = source.offset * spec.dtype.itemsize, target.offset * size
        whole = None if source == View.whole(spec.shape) else source
        return cls(tensor, whole, target, boxes, layout, *offsets)


@dataclass(frozen=True, slots=True)
class Route:
    """What becomes of one name.

    Attributes:
        spec: shape and type of its tensor, which is contiguous.
        copies: what is copied; nothing of a tensor that this rank has no use for.

    """

    spec: TensorSpec
    copies: tuple[Copy, ...]

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor may take this route."""
        spec = self.spec
        return (
            tensor.shape == spec.shape
            and tensor.dtype is spec.dtype
            and tensor.is_contiguous()
            # A subclass with operators of its own may have no memory of its own.
            and type(tensor).__torch_dispatch__ is _PLAIN
        )


@dataclass
class Plan:
    """The routes of a model, until it changes.

    Attributes:
        layout: what the routes were recorded for; see `fingerprint`.
        routes: by name.

    """

    layout: object = None
    routes: dict[str, Route] = field(default_factory=dict)

    def routes_for(self, layout: object) -> dict[str, Route]:
        """Return the routes, if they were recorded for this layout."""
        return self.routes if layout == self.layout else {}

    def take_over(self, routes: dict[str, Route], layout: object) -> None:
        """Add what a complete sync recorded."""
        if layout != self.layout:
            self.routes.clear()
        self.layout = layout
        self.routes |= routes


def fingerprint(
    model: torch.nn.Module,
    metas: Iterable[torch.Tensor],
    placements: Iterable[ExpertPlacement] = (),
) -> object:
    """What routes depend on besides the names: layers' tensors and expert maps.

    Args:
        model: the model.
        metas: its tensors in checkpoint format.
        placements: where its experts are, where they are balanced.

    Returns:
        A value that compares equal as long as nothing changed.

    """
    maps = (layer.expert_map for layer in model.modules() if _has_map(layer))
    local = [m.tolist() for m in maps if isinstance(m, torch.Tensor)]
    layouts = [(m.shape, m.stride(), m.dtype) for m in metas]
    return layouts, local, list(placements)


def _has_map(layer: torch.nn.Module) -> bool:
    """Whether a layer has an expert map; most have none, and take long to say so."""
    own = "expert_map" in vars(layer) or "expert_map" in layer._buffers
    return own or hasattr(type(layer), "expert_map")


@lru_cache(maxsize=1024)
def _strided(
    shape: tuple[int, ...],
    source: tuple[int, ...],
    target: tuple[int, ...],
    itemsize: int,
) -> Strided | None:
    """One object for all experts, which stays in the processor's cache."""
    return Strided.of(shape, source, target, itemsize)
