# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One launch that sums groups of rows of many tensors, to tell tensors apart.

T - tensors
G - groups of a tensor
P - programs that share a tensor
B - words that a program reads at a time

A word is 64 bits, the high half of which is mixed into the low one. Word i of row r of
a group counts m(i) * m(r) times, where m(k) is the odd number (k + 1) * SPREAD | 1, and
sums are modulo 2**64.
"""

from collections.abc import Sequence

import torch

from vllm.triton_utils import tl, triton

__all__ = ["SPREAD", "can_sum_groups", "sum_groups"]

# Fractional bits of the golden ratio: multiplication spreads low bits over high ones.
SPREAD = tl.constexpr(-7046029254386353131)

_BLOCK = 1024
_WORDS_OF_PROGRAM = 1 << 15
_MAX_PROGRAMS_OF_TENSOR = 1 << 12
_MAX_WORDS_OF_GROUP = 1 << 30


def can_sum_groups(tensor: torch.Tensor, rows: int) -> bool:
    """Whether `sum_groups` takes a tensor in groups of so many rows."""
    row_bytes = tensor.shape[-1] * tensor.element_size()
    words = rows * row_bytes // 8
    return row_bytes % 8 == 0 and tensor.is_contiguous() and words < _MAX_WORDS_OF_GROUP


def sum_groups(tensors: Sequence[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
    """Sum the rows of each tensor, so many of them together.

    Args:
        tensors: on one accelerator, or the CPU in Triton's interpreter, [..., R, C]
            with the number of rows that make a group, which divides R; see
            `can_sum_groups`.

    Returns:
        For each the sums of its groups, [G] int64, in their order.

    """
    if not tensors:
        return []
    counts = [t.numel() // (t.shape[-1] * rows) for t, rows in tensors]
    device = tensors[0][0].device
    table = []
    first = jobs = 0
    for (tensor, rows), groups in zip(tensors, counts):
        row = tensor.shape[-1] * tensor.element_size() // 8
        parts = triton.cdiv(row * rows, _WORDS_OF_PROGRAM)
        table.append((tensor.data_ptr(), row, rows, groups, parts, first))
        first, jobs = first + groups, max(jobs, groups * parts)
    rows_T = torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)
    sums = torch.zeros(first, dtype=torch.int64, device=device)
    grid = (min(jobs, _MAX_PROGRAMS_OF_TENSOR), len(tensors))
    with torch.cuda.device_of(sums):
        _sum_kernel[grid](rows_T, sums, BLOCK=_BLOCK)
    return list(sums.split(counts))


@triton.jit
def _sum_kernel(table, sums, BLOCK: tl.constexpr):
    """Add what a program sums to its groups' sums.

    Args:
        table: [T, 6] int64: address, words of a row, rows of a group, groups, programs
            that share a group, and which sum is that of the first group.
        sums: int64, zeros.
        BLOCK: B, a power of two.

    The grid is [P, T].

    """
    tensor = table + 6 * tl.program_id(1).to(tl.int64)
    words = tl.load(tensor).to(tl.pointer_type(tl.int64))
    row = tl.load(tensor + 1).to(tl.int32)
    size = row * tl.load(tensor + 2).to(tl.int32)
    groups = tl.load(tensor + 3)
    parts = tl.load(tensor + 4).to(tl.int32)
    first = tl.load(tensor + 5)
    jobs = (groups * parts).to(tl.int32)
    for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
        group = (job // parts).to(tl.int64)
        sum_B = tl.zeros([BLOCK], dtype=tl.int64)
        for start in range(job % parts * BLOCK, size, parts * BLOCK):
            index_B = start + tl.arange(0, BLOCK)
            exists_B = index_B < size
            words_B = tl.load(words + group * size + index_B, mask=exists_B, other=0)
            words_B ^= (words_B >> 32) & 0xFFFFFFFF
            sum_B += words_B * _odd(index_B % row) * _odd(index_B // row)
        tl.atomic_add(sums + first + group, tl.sum(sum_B), sem="relaxed")


@triton.jit
def _odd(index):
    return (index.to(tl.int64) + 1) * SPREAD | 1
