# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A trainer's bucket: a segment of POSIX shared memory that the trainer made.

The trainer makes the segment and an HTTP request names it, so a request must not be
able to name just any memory of this host. A bucket says by its name that engines may
read it: what does not start with `PREFIX` is not opened, nor what another user owns.
That is enough for any number of ranks and needs no secret, and when a trainer dies
there is nothing to clean up but its own segment.
"""

import mmap
import os
import stat
from pathlib import Path

import regex as re
import torch

__all__ = ["PREFIX", "Bucket"]

PREFIX = "vllm-weights-"

_NAME = re.compile(re.escape(PREFIX) + r"[A-Za-z0-9_-]{1,128}")
# Where Linux keeps POSIX shared memory. `multiprocessing.shared_memory` is for a
# segment's owner: before Python 3.13 it unlinks what it merely attached to.
_FOLDER = Path("/dev/shm")


class Bucket:
    """A mapped segment.

    Args:
        segment: its name, `PREFIX` and up to 128 letters, digits, "-" and "_".

    Attributes:
        segment: its name.

    Raises:
        ValueError: the name is not that of a bucket, or there is no such segment, or
            it is not this user's, or it is empty.

    """

    def __init__(self, segment: str):
        if not isinstance(segment, str) or not _NAME.fullmatch(segment):
            raise ValueError(
                f"expected a segment whose name is {PREFIX!r} and up to 128 letters, "
                f"digits, '-' and '_', got {segment!r:.200}"
            )
        self.segment = segment
        self._map, self._identity = _mapped(segment)

    def memory(self) -> torch.Tensor:
        """Return its memory, uint8 [bytes].

        Raises:
            ValueError: the trainer has cut it down; to read on would end this process.
                Or another segment has its name now.

        """
        if _identity_of(self.segment) not in (self._identity, None):
            raise ValueError(
                f"segment {self.segment!r} is another one than when it was opened; "
                "call init_weight_transfer_engine again"
            )
        size = len(self._map)
        if self._map.size() < size:
            raise ValueError(
                f"segment {self.segment!r} had {size} bytes when it was opened and has "
                f"{self._map.size()} now"
            )
        return torch.frombuffer(self._map, dtype=torch.uint8)


def _identity_of(segment: str) -> tuple[int, int] | None:
    """What tells a segment from an earlier one of its name; None if there is none."""
    try:
        found = os.stat(_FOLDER / segment, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _mapped(segment: str) -> tuple[mmap.mmap, tuple[int, int]]:
    try:
        descriptor = os.open(_FOLDER / segment, os.O_RDWR | os.O_NOFOLLOW)
    except OSError as error:
        raise ValueError(
            f"segment {segment!r} cannot be opened: {error.strerror}"
        ) from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise ValueError(f"segment {segment!r} is not of this engine's user")
        if not found.st_size:
            raise ValueError(f"segment {segment!r} is empty")
        return mmap.mmap(descriptor, found.st_size), (found.st_dev, found.st_ino)
    finally:
        os.close(descriptor)
