# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where kernels record the first bad weight scale that they meet.

A kernel tests the scales of the tile that it computes, and for a bad one claims a word
in device memory; the first one to do so also stores the word in host memory that the
GPU can write. The host reads that like any other memory: no copy, no synchronisation,
and nothing that a CUDA graph could not replay.

    word = slot << 46 | expert << 34 | block_n << 16 | block_k

    slot    - which scale tensor, counted from 1, so that a word in use is never 0
    expert  - local expert
    block_n - block of output features (rows of the weight), or the row itself
    block_k - block of input features (columns of the weight)
"""

from dataclasses import dataclass
from functools import cache

import torch

__all__ = ["BadScale", "ScaleWatch", "scale_watch"]

EXPERT_SHIFT, BLOCK_N_SHIFT, SLOT_SHIFT = 34, 16, 46


@dataclass(frozen=True)
class BadScale:
    """Where a bad scale is.

    Attributes:
        address: address of the scale tensor, [E, ...].
        expert: local expert.
        block_n: block of output features.
        block_k: block of input features.

    """

    address: int
    expert: int
    block_n: int
    block_k: int


class ScaleWatch:
    """The word of one device, and which scale tensors its slots stand for.

    Args:
        device: device of the kernels that record.

    Attributes:
        device_word: [1] int64, 0 until a kernel claims it.
        host_word: [1] int64 in host memory, set by the kernel that claimed it.

    """

    def __init__(self, device: torch.device):
        on_host = device.type == "cpu"
        with torch.inference_mode(False):  # for `reset`, wherever that is called
            self.device_word = torch.zeros(1, dtype=torch.int64, device=device)
            self.host_word = torch.zeros(
                1, dtype=torch.int64, device="cpu", pin_memory=not on_host
            )
        self._slots: dict[int, int] = {}

    def slot(self, scale: torch.Tensor) -> int:
        """The number that stands for a scale tensor in the word."""
        return self._slots.setdefault(scale.data_ptr(), len(self._slots) + 1)

    def poll(self) -> BadScale | None:
        """The first bad scale since the last `reset`; never waits for the GPU."""
        word = int(self.host_word)
        if not word:
            return None
        addresses = {slot: address for address, slot in self._slots.items()}
        return BadScale(
            address=addresses[word >> SLOT_SHIFT],
            expert=word >> EXPERT_SHIFT & 0xFFF,
            block_n=word >> BLOCK_N_SHIFT & 0x3FFFF,
            block_k=word & 0xFFFF,
        )

    def reset(self) -> None:
        """Forget what was recorded."""
        self.device_word.zero_()
        self.host_word.zero_()


@cache
def scale_watch(device: torch.device) -> ScaleWatch:
    """The watch of a device; CUDA graphs hold its address for the process's life."""
    return ScaleWatch(device)
