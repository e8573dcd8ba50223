# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether two tensors are the same, to the last bit."""

import torch

__all__ = ["same_bytes"]


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise equality of two tensors, also of types that torch does not compare."""
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    bytes_of_a, bytes_of_b = (
        t.data.reshape(-1).contiguous().view(torch.uint8) for t in (a, b)
    )
    return torch.equal(bytes_of_a, bytes_of_b)
