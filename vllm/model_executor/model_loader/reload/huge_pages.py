# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Large pages for memory that is filled once and freed.

Such memory costs a fault for each page. With pages of 4 KiB these cost more than the
copy that fills it.
"""

import ctypes
import sys

import torch

__all__ = ["prefer_huge_pages"]

_HUGE_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14  # <sys/mman.h>


def prefer_huge_pages(tensor: torch.Tensor) -> None:
    """Ask the system to back a tensor by large pages, where it can.

    Args:
        tensor: of any shape and type, and not written to yet. What is no large CPU
            tensor, or shares its pages with others, stays as it is.

    """
    if tensor.device.type != "cpu" or sys.platform != "linux":
        return
    start = -(-tensor.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    stop = (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    if start < stop:
        advise = ctypes.CDLL(None).madvise
        # A kernel without them answers with an error, and pages stay small.
        advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_HUGEPAGE)
