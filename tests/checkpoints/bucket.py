# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Send tensors as a trainer with a packed buffer does: through one reused bucket."""

from collections.abc import Iterable, Iterator

import torch

Chunk = list[tuple[str, torch.Tensor]]

ALIGNMENT = 16
# NaN in every floating-point format, -1 in every signed integer one.
POISON = 0xFF


def chunks(
    tensors: Iterable[tuple[str, torch.Tensor]],
    bytes_per_chunk: int,
    bucket: torch.Tensor,
) -> Iterator[Chunk]:
    """Yield the tensors in order, as views of one bucket that each chunk overwrites.

    When the consumer comes back for more, whatever it may have kept is poison.

    Args:
        tensors: Names and tensors, in the order in which they are sent.
        bytes_per_chunk: A chunk ends before it would exceed this; a tensor that alone
            exceeds it is a chunk of its own.
        bucket: uint8, [bytes], on any device; at least as big as the biggest tensor.

    Raises:
        ValueError: A tensor does not fit into the bucket.
    """
    limit = min(bytes_per_chunk, bucket.numel())
    chunk: Chunk = []
    used = 0
    for name, tensor in tensors:
        if chunk and used + tensor.nbytes > limit:
            yield from _lend(chunk, bucket)
            chunk, used = [], 0
        chunk.append((name, _pack(name, tensor, bucket, used)))
        used += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    if chunk:
        yield from _lend(chunk, bucket)


def _pack(
    name: str, tensor: torch.Tensor, bucket: torch.Tensor, start: int
) -> torch.Tensor:
    """Copy `tensor` to byte `start` of the bucket and return the view that holds it."""
    stop = start + tensor.nbytes
    if stop > bucket.numel():
        raise ValueError(
            f"{name} needs {tensor.nbytes} bytes, the bucket has {bucket.numel()}; "
            "make the bucket at least as big as the biggest tensor"
        )
    view = bucket[start:stop].view(tensor.dtype).view(tensor.shape)
    return view.copy_(tensor)


def _lend(chunk: Chunk, bucket: torch.Tensor) -> Iterator[Chunk]:
    try:
        yield chunk
    finally:
        bucket.fill_(POISON)
