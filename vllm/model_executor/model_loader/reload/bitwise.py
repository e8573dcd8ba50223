# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether two tensors are the same, to the last bit."""

import torch

__all__ = ["bytes_of", "same_bytes"]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor of any shape and type, [bytes] uint8; copied if strided."""
    flat = tensor.detach().reshape(-1).contiguous()
    # A single element may have any stride, and torch then refuses the view.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise equality of two tensors, also of types that torch does not compare."""
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    return torch.equal(bytes_of(a.data), bytes_of(b.data))
