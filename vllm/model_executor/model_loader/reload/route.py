# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where one tensor of a checkpoint goes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from vllm.model_executor.kernels.strided import Strided

from .calls import TensorSpec
from .ledger import Box
from .view import View

__all__ = ["PLAIN_DISPATCH", "Copy", "Route"]

# Of tensors with memory of their own: subclasses with operators may have none.
PLAIN_DISPATCH = torch.Tensor.__torch_dispatch__


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
            and type(tensor).__torch_dispatch__ is PLAIN_DISPATCH
            and not tensor.is_neg()  # torch negates such a one as it reads it
        )


@lru_cache(maxsize=1024)
def _strided(
    shape: tuple[int, ...],
    source: tuple[int, ...],
    target: tuple[int, ...],
    itemsize: int,
) -> Strided | None:
    """One object for all experts, which stays in the processor's cache."""
    return Strided.of(shape, source, target, itemsize)
