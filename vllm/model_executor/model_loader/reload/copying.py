# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Carrying out what a plan says: one copy at a time, or many at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from ctypes import memmove
from functools import partial

import torch

from vllm.model_executor.kernels.strided import Strided
from vllm.triton_utils import HAS_TRITON

from .plan import Copy

__all__ = ["Copies", "batch_launcher"]

# Copies by their shape: from source to target address, by target address.
Batches = Mapping[Strided, Mapping[int, int]]
Launch = Callable[[Batches], None]

# Of longer runs torch has its threads copy a share each.
_BYTES_OF_ONE_THREAD = 1 << 15


def batch_launcher(device: torch.device) -> Launch | None:
    """What launches many copies on a device; None where nothing does."""
    if device.type == "cpu" or not HAS_TRITON:
        return None
    from vllm.model_executor.kernels.strided_copy import copy_strided

    return partial(copy_strided, device=device)


class Copies:
    """Copies from a caller's tensors to staged memory.

        copies.add(copy, tensor, memory)    # may be put off
        copies.flush()                      # before anybody reads the memory, or
                                            # changes a tensor

    A tensor that is on another device, or is cast on the way, is copied at once. So is
    all on a CPU, short runs without torch, which takes longer to prepare such a copy
    than to make it.

    Args:
        launch: carries out many copies at once; see `batch_launcher`.

    Attributes:
        put_off: whether copies may wait for `flush`.

    """

    def __init__(self, launch: Launch | None = None) -> None:
        self.put_off = False
        self._launch = launch
        self._waiting: defaultdict[Strided, dict[int, int]] = defaultdict(dict)

    def add(self, copy: Copy, tensor: torch.Tensor, memory: torch.Tensor) -> None:
        """Copy a part of `tensor` to a part of `memory`."""
        layout = copy.layout
        target = memory.data_ptr() + copy.target_bytes
        source = tensor.data_ptr() + copy.source_bytes
        may_wait = self.put_off and self._launch is not None
        if may_wait and layout and tensor.get_device() == memory.get_device():
            self._waiting[layout][target] = source
            return
        # Of a repeated target the last source counts.
        if layout and layout in self._waiting:
            self._waiting[layout].pop(target, None)
        if layout and _is_short(layout) and tensor.is_cpu and memory.is_cpu:
            memmove(target, source, layout.row_bytes)
        else:
            part = tensor if copy.source is None else copy.source.on(tensor)
            copy.target.on(memory.data).copy_(part)

    def flush(self) -> None:
        """Carry out what was put off."""
        waiting, self._waiting = self._waiting, defaultdict(dict)
        if waiting:
            assert self._launch is not None
            self._launch(waiting)


def _is_short(layout: Strided) -> bool:
    """Whether it is one run that torch would copy on one thread."""
    return layout.outer == layout.rows == 1 and layout.row_bytes <= _BYTES_OF_ONE_THREAD
