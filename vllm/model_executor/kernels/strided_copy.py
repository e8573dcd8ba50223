# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Few launches for many copies: one for those that are one run each.

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
    batches: Mapping[Strided, Mapping[int, int]], device: torch.device
) -> None:
    """Copy between addresses of one device, on its current stream.

    Args:
        batches: what is copied, and from where to where: the address of each source,
            by that of the target; in bytes. Targets must not overlap.
        device: an accelerator, or the CPU in Triton's interpreter.

    """
    runs: dict[int, list[tuple[int, Mapping[int, int]]]] = {}
    for layout, addresses in batches.items():
        if not addresses or not layout.outer * layout.rows * layout.row_bytes:
            continue
        aligned = _alignment([*layout[2:], *addresses, *addresses.values()])
        if layout.outer * layout.rows == 1:
            runs.setdefault(aligned, []).append((layout.row_bytes, addresses))
        else:
            _copy_rows(layout, addresses, aligned, device)
    for aligned, batch in runs.items():
        _copy_runs(batch, aligned, device)


def _copy_runs(
    batch: list[tuple[int, Mapping[int, int]]], aligned: int, device: torch.device
) -> None:
    """Copy what is in one piece, whatever its size."""
    word = _WORDS[aligned]
    size = word.primitive_bitwidth // 8
    targets, sources, words = array("q"), array("q"), array("q")
    for run_bytes, addresses in batch:
        targets.extend(addresses)
        sources.extend(addresses.values())
        words.extend([run_bytes // size] * len(addresses))
    table_3C = _on_device(targets + sources + words, device)
    block = _BYTES_OF_PROGRAM // size
    programs = min(triton.cdiv(max(words), block), _MAX_PROGRAMS_OF_COPY)
    with torch.cuda.device_of(table_3C):
        _copy_runs_kernel[len(targets), programs](
            table_3C, len(targets), WORD=word, ALIGNED=aligned, BLOCK=block
        )


def _copy_rows(
    layout: Strided, addresses: Mapping[int, int], aligned: int, device: torch.device
) -> None:
    """Copy what is in many pieces."""
    word = _WORDS[aligned]
    size = word.primitive_bitwidth // 8
    pairs = array("q", [*addresses, *addresses.values()])
    table_2C = _on_device(pairs, device)
    run = layout.row_bytes // size
    block = min(_BYTES_OF_PROGRAM // size, triton.next_power_of_2(run))
    words = layout.outer * layout.rows * run
    programs = min(triton.cdiv(words, block), _MAX_PROGRAMS_OF_COPY)
    with torch.cuda.device_of(table_2C):
        _copy_rows_kernel[len(addresses), programs](
            table_2C,
            len(addresses),
            layout.rows,
            run,
            words,
            *(stride // size for stride in layout[3:]),
            WORD=word,
            ALIGNED=aligned,
            BLOCK=block,
        )


def _on_device(numbers: array, device: torch.device) -> torch.Tensor:
    return torch.frombuffer(numbers, dtype=torch.int64).to(device, non_blocking=True)


def _alignment(numbers: Iterable[int]) -> int:
    """The largest power of two, 16 at most, that divides all of them."""
    bits = reduce(or_, numbers, 16)
    return bits & -bits


# Not compiled anew for one copy, or a multiple of 16: a first sync would wait for that.
@triton.jit(do_not_specialize=["copies"])
def _copy_runs_kernel(
    table, copies, WORD: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Copy one run for each column of the table.

    Args:
        table: [3, C] int64: addresses of targets and of sources, and words to copy.
        copies: C.
        WORD: integer type that addresses and runs are multiples of.
        ALIGNED: bytes that addresses are multiples of.
        BLOCK: B, a power of two.

    The grid is [C, programs of a copy].

    """
    copy = table + tl.program_id(0).to(tl.int64)
    target = tl.multiple_of(tl.load(copy), ALIGNED).to(tl.pointer_type(WORD))
    source = tl.multiple_of(tl.load(copy + copies), ALIGNED).to(tl.pointer_type(WORD))
    words = tl.load(copy + 2 * copies)
    first = tl.program_id(1).to(tl.int64) * BLOCK
    step = tl.num_programs(1).to(tl.int64) * BLOCK
    for start in range(first, words, step):
        index_B = start + tl.arange(0, BLOCK).to(tl.int64)
        exists_B = index_B < words
        words_B = tl.load(source + index_B, mask=exists_B)
        tl.store(target + index_B, words_B, mask=exists_B)


@triton.jit(do_not_specialize=["copies"])
def _copy_rows_kernel(
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
        row_B = index_B // run
        outer_B = row_B // rows
        at_B = index_B % run
        row_B = row_B % rows
        source_B = outer_B * source_outer + row_B * source_row + at_B
        target_B = outer_B * target_outer + row_B * target_row + at_B
        words_B = tl.load(source + source_B, mask=exists_B)
        tl.store(target + target_B, words_B, mask=exists_B)
