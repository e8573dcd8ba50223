# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where the tensors of a chunk lie in a trainer's bucket.

What a trainer says of them is checked here, to the last byte, before anything is read
or made: types, counts and sizes first, then that each tensor lies inside the bucket, on
a multiple of its element size, and apart from the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from vllm.distributed.weight_transfer.update_entry import (
    Entry,
    check_lists,
    is_size,
    short,
)

__all__ = ["MAX_TENSORS", "Placement", "placements"]

MAX_TENSORS = 1 << 16

# No bool: a byte that is neither 0 nor 1 would be undefined behaviour.
_FLOATS = "float64 float32 float16 bfloat16"
_FLOATS_8 = "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
_INTEGERS = "int64 int32 int16 int8 uint8"
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in f"{_FLOATS} {_FLOATS_8} {_INTEGERS}".split()
}


@dataclass(frozen=True)
class Placement:
    """A tensor in a bucket.

    Attributes:
        name: its name in the checkpoint.
        dtype: its type.
        shape: its shape; it is contiguous.
        start: its first byte.

    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        """The first byte after it."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def view(self, bucket: torch.Tensor) -> torch.Tensor:
        """Return the tensor as a view of its bucket, uint8 [bytes]."""
        return bucket[self.start : self.stop].view(self.dtype).view(self.shape)


def placements(
    names: Any, dtype_names: Any, shapes: Any, offsets: Any, bucket_bytes: int
) -> list[Placement]:
    """Check what a trainer says of a chunk.

    Args:
        names: list of the tensors' names in the checkpoint.
        dtype_names: list of their types, such as "bfloat16".
        shapes: list of their shapes, each a list of sizes.
        offsets: list of their first bytes in the bucket.
        bucket_bytes: the bucket's size.

    Returns:
        The placements, in the order of the lists.

    Raises:
        ValueError: something is wrong; the message names the tensor and says what.

    """
    lists = {
        "names": names,
        "dtype_names": dtype_names,
        "shapes": shapes,
        "offsets": offsets,
    }
    check_lists(lists, MAX_TENSORS)
    placed = [
        BucketEntry(index, *values).placed(bucket_bytes)
        for index, values in enumerate(zip(*lists.values()))
    ]
    _check_apart(placed)
    return placed


@dataclass(frozen=True)
class BucketEntry(Entry):
    """What a trainer says of one tensor in its bucket; of any type."""

    offset: Any

    def placed(self, bucket_bytes: int) -> Placement:
        """Check it.

        Raises:
            ValueError: something is wrong.

        """
        self.check_name()
        if not isinstance(self.dtype_name, str) or self.dtype_name not in DTYPES:
            self._refuse("dtype", f"one of {', '.join(DTYPES)}", self.dtype_name)
        self.check_shape()
        dtype = DTYPES[self.dtype_name]
        if not is_size(self.offset) or self.offset % dtype.itemsize:
            self._refuse("offset", f"a multiple of {dtype.itemsize}", self.offset)
        placement = Placement(self.name, dtype, tuple(self.shape), self.offset)
        if placement.stop > bucket_bytes:
            place = f"bytes {placement.start} to {placement.stop}"
            self._refuse("place", f"in a bucket of {bucket_bytes} bytes", place)
        return placement


def _check_apart(placed: Sequence[Placement]) -> None:
    filled = (each for each in placed if each.start < each.stop)
    for one, next_one in pairwise(sorted(filled, key=lambda each: each.start)):
        if next_one.start < one.stop:
            raise ValueError(
                f"update_info: {short(one.name)} (bytes {one.start} to {one.stop}) "
                f"and {short(next_one.name)} (bytes {next_one.start} to "
                f"{next_one.stop}) overlap"
            )
