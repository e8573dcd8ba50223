# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which types may stand for which."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .staging import StagedTensor

__all__ = ["check_castable", "is_castable"]

_FLOATS = {torch.bfloat16, torch.float16, torch.float32, torch.float64}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
# An exponent alone: a scale, exact in any wider float.
_EXPONENTS = {torch.float8_e8m0fnu}


def is_castable(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether values of `source` keep their meaning when copied into `target`."""
    if source == target:
        return True
    if target in _FLOATS:
        return source in _FLOATS | _EXPONENTS
    if target in _INTEGERS:
        return source in _INTEGERS and source.itemsize <= target.itemsize
    return False


def check_castable(tensor: StagedTensor, source: torch.Tensor) -> None:
    """Refuse a source whose type cannot stand for the staged tensor's.

    Raises:
        WeightSyncError: e.g. a bfloat16 tensor came for an FP8 weight, which would be
            cast without its scale.

    """
    target = tensor.meta.dtype
    if is_castable(source.dtype, target):
        return
    if any(spec.dtype == source.dtype for spec in tensor.first_load.calls.values()):
        return  # a checkpoint of this type is what the model was first loaded from
    raise tensor.refuse(
        f"expected {_name(target)}, got {_name(source.dtype)}; quantise the weight as "
        "the checkpoint does and send its scale with it"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
