# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Carrying out what a plan says: one copy at a time, or many at once."""

from __future__ import annotations

import torch

from vllm.model_executor.kernels.strided import Strided
from vllm.triton_utils import HAS_TRITON

from .plan import Copy

__all__ = ["Copies"]


class Copies:
    """Copies from a caller's tensors to staged memory.

        copies.add(copy, tensor, memory)    # may be put off
        copies.flush()                      # before anybody reads the memory, or
                                            # changes a tensor

    On an accelerator those of the same shape go in one launch. A tensor that is not
    there yet, or is cast on the way, is copied at once.

    Attributes:
        put_off: whether copies may wait for `flush`.

    """

    def __init__(self) -> None:
        self.put_off = False
        self._device: torch.device | None = None
        self._waiting: dict[Strided, dict[int, int]] = {}

    def add(self, copy: Copy, tensor: torch.Tensor, memory: torch.Tensor) -> None:
        """Copy a part of `tensor` to a part of `memory`, both without gradients."""
        layout = copy.layout
        if layout is None or not self._may_wait(tensor, memory):
            source = tensor if copy.source is None else copy.source.on(tensor)
            copy.target.on(memory).copy_(source)
            return
        target = memory.data_ptr() + copy.target_bytes
        # Of a repeated target the last source counts.
        waiting = self._waiting.setdefault(layout, {})
        waiting[target] = tensor.data_ptr() + copy.source_bytes

    def _may_wait(self, tensor: torch.Tensor, memory: torch.Tensor) -> bool:
        if not (self.put_off and HAS_TRITON) or tensor.is_cpu:
            return False
        self._device = memory.device
        return tensor.device == memory.device

    def flush(self) -> None:
        """Launch what was put off."""
        if self._waiting:
            from vllm.model_executor.kernels.strided_copy import copy_strided

            waiting, self._waiting = self._waiting, {}
            assert self._device is not None
            for layout, addresses in waiting.items():
                copy_strided(layout, addresses, self._device)

    def discard(self) -> None:
        """Forget what was put off."""
        self._waiting.clear()
