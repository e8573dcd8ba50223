# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Boxes in the words of the people who train: expert, gate, up, down, rows.

    E - local experts
    I - intermediate size of an expert, on this rank
    H - hidden size

`w13_*` tensors are [E, 2 * I, H] and their scales [E, 2 * blocks(I), blocks(H)]: gate
("w1") is the first half of dimension 1 and up ("w3") the second. Per-tensor scales are
[E, 2]. `w2_*` tensors hold down ("w2") alone.
"""

import torch

from .errors import Finding
from .ledger import Box

__all__ = ["describe", "shard_box"]


def shard_box(tensor: torch.Tensor, expert: int, shard_id: str) -> Box:
    """The box of one expert's shard ("w1", "w2" or "w3") in a tensor [E, ...]."""
    box = Box.whole(tensor.shape).at(expert)
    if shard_id not in ("w1", "w3") or tensor.dim() < 2:
        return box
    half = tensor.shape[1] // 2
    begin, end = (0, half) if shard_id == "w1" else (half, 2 * half)
    return Box((expert, begin, *box.start[2:]), (expert + 1, end, *box.stop[2:]))


def describe(
    layer: str, name: str, tensor: torch.Tensor, box: Box | None, detail: str
) -> Finding:
    """A finding about `box` of `tensor` (about all of it if None)."""
    box = box or Box.whole(tensor.shape)
    family = name.split("_", 1)[0]
    if family not in ("w13", "w2") or tensor.dim() < 1:
        return Finding(layer, name, detail + _where(box, tensor, first=0))
    expert = box.start[0] if box.stop[0] - box.start[0] == 1 else None
    shard = "down" if family == "w2" else _half(box, tensor)
    where = _where(box, tensor, first=1, shard=shard)
    if expert is None and tensor.shape[0] != box.stop[0] - box.start[0]:
        where = f" (experts {box.start[0]} to {box.stop[0] - 1})"
    return Finding(layer, name, detail + where, expert, shard)


def _half(box: Box, tensor: torch.Tensor) -> str | None:
    """Which half of the fused dimension a box lies in, if in one."""
    if tensor.dim() < 2:
        return None
    half = tensor.shape[1] // 2
    if box.stop[1] <= half:
        return "gate"
    return "up" if box.start[1] >= half else None


def _where(box: Box, tensor: torch.Tensor, first: int, shard: str | None = None) -> str:
    """Index of the box in the dimensions from `first`, unless it is all of them."""
    whole = Box.whole(tensor.shape)
    if shard in ("gate", "up"):
        half = tensor.shape[1] // 2
        begin, end = (0, half) if shard == "gate" else (half, 2 * half)
        whole = Box(
            (whole.start[0], begin, *whole.start[2:]),
            (whole.stop[0], end, *whole.stop[2:]),
        )
    if (
        box.start[first:] == whole.start[first:]
        and box.stop[first:] == whole.stop[first:]
    ):
        return ""
    ranges = [f"{a}:{b}" for a, b in zip(box.start[first:], box.stop[first:])]
    return f" at [{', '.join(ranges)}]"
