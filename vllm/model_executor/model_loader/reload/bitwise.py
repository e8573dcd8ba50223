# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether two tensors are the same, to the last bit."""

import torch

__all__ = ["bytes_of", "same_bytes"]

# What is compared at once, for which a GPU needs as much memory again.
_PART_BYTES = 1 << 25


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor of any shape and type, [bytes] uint8; copied if strided."""
    flat = tensor.detach().reshape(-1).contiguous()
    # A single element may have any stride, and torch then refuses the view.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise equality of two tensors, also of types that torch does not compare."""
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    a, b = a.data, b.data
    if a.shape != b.shape or a.nbytes <= _PART_BYTES:
        return torch.equal(bytes_of(a), bytes_of(b))
    rows = max(1, _PART_BYTES * len(a) // a.nbytes)
    parts = zip(a.split(rows), b.split(rows))
    return all(torch.equal(bytes_of(one), bytes_of(other)) for one, other in parts)
