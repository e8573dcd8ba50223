# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors as a trainer sends them through shared memory, sound and spoilt."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from multiprocessing.shared_memory import SharedMemory
from typing import Any
from uuid import uuid4

import torch

__all__ = [
    "BUCKET_BYTES",
    "PREFIX",
    "Damage",
    "Packed",
    "bucket_of_a_trainer",
    "is_scale",
    "pack",
]

Named = tuple[str, torch.Tensor]
ALIGNMENT = 16
BUCKET_BYTES = 1 << 20
PREFIX = "vllm-weights-"


class Damage(Enum):
    """What a trainer does wrong in a chunk."""

    NO_SCALES = "scales missing"
    NAN_SCALE = "scale not finite"
    WRONG_SHAPE = "wrong shape"
    NO_SUCH_EXPERT = "no such expert"

    def apply(self, tensors: list[Named]) -> list[Named]:
        """Return what is sent in place of these."""
        return _DAMAGES[self](tensors)


@dataclass(frozen=True)
class Packed:
    """A chunk: the bytes in the bucket, and what is said of them.

    Attributes:
        data: the bytes.
        lists: fields of the request but for the segment.
    """

    data: bytes
    lists: dict[str, list[Any]] = field(default_factory=dict)

    def write(self, bucket: SharedMemory) -> dict[str, Any]:
        """Fill the bucket, and return the request."""
        assert bucket.buf is not None
        bucket.buf[: len(self.data)] = self.data
        return {"update_info": {"segment": bucket.name, **self.lists}}

    def beyond(self, size: int) -> "Packed":
        """The same chunk, said to begin at the end of a bucket of this size."""
        offsets = [size + offset for offset in self.lists["offsets"]]
        return replace(self, lists={**self.lists, "offsets": offsets})


@contextmanager
def bucket_of_a_trainer(size: int = BUCKET_BYTES) -> Iterator[SharedMemory]:
    """Make a bucket, and free it in the end."""
    name = f"{PREFIX}{uuid4().hex}"
    bucket = SharedMemory(name, create=True, size=size)
    try:
        yield bucket
    finally:
        bucket.close()
        bucket.unlink()


def pack(tensors: Iterable[Named]) -> Packed:
    """Lay tensors out one behind the other."""
    data = bytearray()
    lists: dict[str, list[Any]] = {
        key: [] for key in ("names", "dtype_names", "shapes", "offsets")
    }
    for name, tensor in tensors:
        lists["names"].append(name)
        lists["dtype_names"].append(str(tensor.dtype).removeprefix("torch."))
        lists["shapes"].append(list(tensor.shape))
        lists["offsets"].append(len(data))
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        data += flat.numpy().tobytes() + bytes(-flat.numel() % ALIGNMENT)
    return Packed(bytes(data), lists)


def is_scale(name: str) -> bool:
    return name.endswith("_scale_inv")


def _without_scales(tensors: list[Named]) -> list[Named]:
    return [item for item in tensors if not is_scale(item[0])]


def _with_nan(tensors: list[Named]) -> list[Named]:
    return [(n, t * torch.nan if is_scale(n) else t) for n, t in tensors]


def _misshapen(tensors: list[Named]) -> list[Named]:
    (name, tensor), *others = tensors
    return [*others, (name, tensor.reshape(1, 1, -1))]


def _unknown(tensors: list[Named]) -> list[Named]:
    name = "model.layers.0.mlp.experts.99.down_proj.weight"
    return [*tensors, (name, torch.ones(4, 4))]


_DAMAGES = {
    Damage.NO_SCALES: _without_scales,
    Damage.NAN_SCALE: _with_nan,
    Damage.WRONG_SHAPE: _misshapen,
    Damage.NO_SUCH_EXPERT: _unknown,
}
