# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A view of a tensor, apart from the tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["View"]


@dataclass(frozen=True, slots=True)
class View:
    """A view of a tensor; strides and offset count elements of its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def extent(self) -> int:
        """How many elements of the storage lie from its first to its last one."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride))

    @classmethod
    def of(cls, view: torch.Tensor, owner: torch.Tensor) -> View:
        """Describe `view` relative to the first element of `owner`."""
        offset = int(view.storage_offset() - owner.storage_offset())
        return cls(tuple(view.shape), view.stride(), offset)

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> View:
        """All of a contiguous tensor."""
        stride, size = [], 1
        for extent in reversed(shape):
            stride.append(size)
            size *= max(extent, 1)
        return cls(tuple(shape), tuple(reversed(stride)), 0)

    def on(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same view of another tensor."""
        offset = self.offset + int(tensor.storage_offset())
        return tensor.as_strided(self.shape, self.stride, offset)
