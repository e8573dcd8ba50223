# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One launch for many copies of the same shape and strides.

C - copies
B - words that a program moves at a time
"""

from array import array
from collections.abc import Iterable, Mapping
from functools import reduce
from operator import or_

import torch
import triton
import triton.language as tl

from .strided import Strided

__all__ = ["copy_strided"]

_WORDS = {
    16: tl.int64,  # two at a time
    8: tl.int64,
    4: tl.int32,
    2: tl.int16,
    1: tl.int8,
}
_BYTES_OF_PROGRAM = 1 << 14
_MAX_PROGRAMS_OF_COPY = 1 << 15


def copy_strided(
    layout: Strided, addresses: Mapping[int, int], device: torch.device
) -> None:
    """Copy between addresses of one device, on its current stream.

    Args:
        layout: what is copied, from each source to each target.
        addresses: that of the source, by that of the target; in bytes. Targets must
            not overlap.
        device: an accelerator, or the CPU in Triton's interpreter.

    """
    if not addresses or not layout.outer * layout.rows * layout.row_bytes:
        return
    pairs = array("q", [*addresses, *addresses.values()])
    table = torch.frombuffer(pairs, dtype=torch.int64).to(device, non_blocking=True)
    aligned = _alignment([*layout[2:], *pairs])
    word = _WORDS[aligned]
    size = word.primitive_bitwidth // 8
    run = layout.row_bytes // size
    block = min(_BYTES_OF_PROGRAM // size, triton.next_power_of_2(run))
    words = layout.outer * layout.rows * run
    programs = min(triton.cdiv(words, block), _MAX_PROGRAMS_OF_COPY)
    with torch.cuda.device_of(table):
        _copy_kernel[len(addresses), programs](
            table,
            len(addresses),
            layout.rows,
            run,
            words,
            *(stride // size for stride in layout[3:]),
            WORD=word,
            ALIGNED=aligned,
            CONTIGUOUS=layout.outer * layout.rows == 1,
            BLOCK=block,
        )


def _alignment(numbers: Iterable[int]) -> int:
    """The largest power of two, 16 at most, that divides all of them."""
    bits = reduce(or_, numbers, 16)
    return bits & -bits


@triton.jit
def _copy_kernel(
    table,
    copies,
    rows,
    run,
    words,
    source_outer,
    source_row,
    target_outer,
    target_row,
    WORD: tl.constexpr,
    ALIGNED: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy `words` words for each column of the table.

    Args:
        table: [2, C] int64: addresses of targets and of sources.
        copies: C.
        rows: runs in each outer step.
        run: words of a run.
        words: of a copy.
        source_outer: stride of an outer step, in words.
        source_row: stride of a run, in words.
        target_outer: stride of an outer step, in words.
        target_row: stride of a run, in words.
        WORD: integer type that addresses, strides and runs are multiples of.
        ALIGNED: bytes that addresses and strides are multiples of.
        CONTIGUOUS: whether a copy is one run.
        BLOCK: B, a power of two.

    The grid is [C, programs of a copy].

    """
    copy = tl.program_id(0).to(tl.int64)
    target = tl.load(table + copy)
    source = tl.load(table + copies + copy)
    target = tl.multiple_of(target, ALIGNED).to(tl.pointer_type(WORD))
    source = tl.multiple_of(source, ALIGNED).to(tl.pointer_type(WORD))
    first = tl.program_id(1).to(tl.int64) * BLOCK
    step = tl.num_programs(1).to(tl.int64) * BLOCK
    for start in range(first, words, step):
        index_B = start + tl.arange(0, BLOCK).to(tl.int64)
        exists_B = index_B < words
        if CONTIGUOUS:
            source_B = index_B
            target_B = index_B
        else:
            row_B = index_B // run
            outer_B = row_B // rows
            at_B = index_B % run
            row_B = row_B % rows
            source_B = outer_B * source_outer + row_B * source_row + at_B
            target_B = outer_B * target_outer + row_B * target_row + at_B
        words_B = tl.load(source + source_B, mask=exists_B)
        tl.store(target + target_B, words_B, mask=exists_B)
