# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The pages of a mapped file: in memory before somebody looks, and out of it after.

A look at a page that is not there stops the thread that looks, and where the file ends
before, it ends the process. Asked first, the system brings many pages with one call, or
answers with an error.
"""

import ctypes
import mmap
import os
import sys
from errno import EINVAL

__all__ = ["fault_in", "release"]

# <sys/mman.h>; the second since Linux 5.14.
_MADV_DONTNEED, _MADV_POPULATE_READ = 4, 22


def fault_in(pages: mmap.mmap, start: int, stop: int) -> None:
    """Bring bytes of a file to memory, and wait until they are there.

    A system that knows no such call leaves it to whoever looks.

    Args:
        pages: the file, mapped so that it may be written to.
        start: the first byte.
        stop: the one behind the last.

    Raises:
        OSError: they cannot be read: the file ends before, or the disk fails.

    """
    _advise(pages, start, stop, _MADV_POPULATE_READ)


def release(pages: mmap.mmap, start: int, stop: int) -> None:
    """Take bytes of a file out of the memory of this process.

    Whoever looks at them later sees those of the file, whatever was written to them.

    Args:
        pages: the file, mapped so that it may be written to.
        start: the first byte.
        stop: the one behind the last.

    """
    _advise(pages, start, stop, _MADV_DONTNEED)


def _advise(pages: mmap.mmap, start: int, stop: int, advice: int) -> None:
    """What `mmap.madvise` does, which keeps other threads from running meanwhile."""
    if sys.platform != "linux":
        return
    start -= start % mmap.PAGESIZE
    first = ctypes.c_char.from_buffer(pages, start)  # raises behind the end
    address = ctypes.c_void_p(ctypes.addressof(first))
    size = ctypes.c_size_t(min(stop, len(pages)) - start)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(address, size, advice) and ctypes.get_errno() != EINVAL:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
