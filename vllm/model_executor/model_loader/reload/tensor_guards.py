# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether tensors are like others, asked of torch in one call."""

from typing import Any

import torch
from torch._C._dynamo.guards import TensorGuards

__all__ = ["TensorGuards", "guards_of"]

# Torch needs to be told, whatever its signature says.
_NOTHING_DYNAMIC: Any = dict(dynamic_dims_sizes=None, dynamic_dims_strides=None)


def guards_of(*tensors: torch.Tensor) -> TensorGuards:
    """Guards by which compiled code tells whether it may run.

    Their `check` takes as many tensors, and is true if these have the same types,
    dispatch keys, dtypes, devices, sizes and strides, and none of them comes twice.
    """
    return TensorGuards(*tensors, **_NOTHING_DYNAMIC)
