# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Few launches for many copies: one for those that are one run each.

C - copies
B - words that a program moves at a time
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import reduce
from operator import or_

import numpy as np
import torch

from vllm.triton_utils import tl, triton

from .strided import Batch, Strided

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
# Of all copies together: beside a long one, most programs of a short one find nothing.
_MAX_PROGRAMS = 1 << 17


def copy_strided(batches: Sequence[Batch], device: torch.device) -> None:
    """Copy between addresses of one device, on its current stream.

    Args:
        batches: what is copied, and to where from where. Targets must not overlap.
        device: an accelerator, or the CPU in Triton's interpreter.

    """
    runs: list[Batch] = []
    rows: defaultdict[Strided, list[Batch]] = defaultdict(list)
    for batch in batches:
        layout, target_C, _ = batch
        if not len(target_C) or not layout.outer * layout.rows * layout.row_bytes:
            continue
        is_run = layout.outer * layout.rows == 1
        (runs if is_run else rows[layout]).append(batch)
    if runs:
        _copy_runs(_table(runs), device)
    for layout, alike in rows.items():
        _copy_rows(layout, _table(alike)[:2], device)


def _table(batches: list[Batch]) -> np.ndarray:
    """Addresses of targets, of sources, and bytes of a run, [3, C] int64."""
    layouts, targets, sources = zip(*batches)
    counts = [len(target_C) for target_C in targets]
    table_3C = np.empty((3, sum(counts)), dtype=np.int64)
    np.concatenate(targets, out=table_3C[0])
    np.concatenate(sources, out=table_3C[1])
    table_3C[2] = np.repeat([layout.row_bytes for layout in layouts], counts)
    return table_3C


def _copy_runs(table_3C: np.ndarray, device: torch.device) -> None:
    """Copy what is in one piece, whatever its size."""
    aligned_C = _alignment(table_3C)
    of_any = int(np.bitwise_or.reduce(aligned_C))
    for aligned in (each for each in _WORDS if each & of_any):
        word = _WORDS[aligned]
        size = word.primitive_bitwidth // 8
        alike_3C = table_3C
        if of_any != aligned:
            alike_3C = table_3C.compress(aligned_C == aligned, axis=1)
        alike_3C[2] //= size
        copies, words = alike_3C.shape[1], int(alike_3C[2].max())
        block = _BYTES_OF_PROGRAM // size
        programs = _programs(words, block, copies)
        table = _on_device(alike_3C, device)
        with torch.cuda.device_of(table):
            _copy_runs_kernel[copies, programs](
                table, copies, WORD=word, ALIGNED=aligned, BLOCK=block
            )


def _copy_rows(layout: Strided, addresses_2C: np.ndarray, device: torch.device) -> None:
    """Copy what is in many pieces."""
    strides = reduce(or_, layout[2:])
    aligned = int(_alignment(addresses_2C | strides).min())
    word = _WORDS[aligned]
    size = word.primitive_bitwidth // 8
    table_2C = _on_device(addresses_2C, device)
    run = layout.row_bytes // size
    block = min(_BYTES_OF_PROGRAM // size, triton.next_power_of_2(run))
    words = layout.outer * layout.rows * run
    copies = table_2C.shape[1]
    programs = _programs(words, block, copies)
    with torch.cuda.device_of(table_2C):
        _copy_rows_kernel[copies, programs](
            table_2C,
            copies,
            layout.rows,
            run,
            words,
            *(stride // size for stride in layout[3:]),
            WORD=word,
            ALIGNED=aligned,
            BLOCK=block,
        )


def _programs(words: int, block: int, copies: int) -> int:
    """How many programs share each copy; they take more than a block if they must."""
    most = min(_MAX_PROGRAMS_OF_COPY, _MAX_PROGRAMS // copies)
    return max(1, min(-(-words // block), most))


def _on_device(table: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(table).to(device, non_blocking=True)


def _alignment(bytes_nC: np.ndarray) -> np.ndarray:
    """The largest power of two up to 16 that divides all of a column, [C]."""
    bits_C = np.bitwise_or.reduce(bytes_nC, axis=0) | 16
    return bits_C & -bits_C


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
