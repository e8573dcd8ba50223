# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One launch that finds the bad scales among those of all layers.

    T - scale tensors
    P - programs that share a tensor
    C - values that a program reads at a time

A good scale is finite and positive, however small. Values are widened to float32 and
judged by their bits, so that no compiler may assume NaN away and no denormal is zero.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from vllm.triton_utils import tl, triton

__all__ = ["SCALE_DTYPES", "ScaleFaults", "scan_scales"]

FLOAT32 = tl.constexpr(0)
FLOAT16 = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)
E8M0 = tl.constexpr(3)
# Bits of the float32 infinity: above them is NaN, below them what is finite.
INFINITY = tl.constexpr(0x7F800000)
NOWHERE = tl.constexpr(2**63 - 1)

_FORMATS = {
    torch.float32: FLOAT32,
    torch.float16: FLOAT16,
    torch.bfloat16: BFLOAT16,
    torch.float8_e8m0fnu: E8M0,
    torch.uint8: E8M0,
    torch.int32: E8M0,  # four of them, the first in the lowest byte
}
SCALE_DTYPES = frozenset(_FORMATS)

_MAX_VALUES = 2**31
_MAX_PROGRAMS_PER_TENSOR = 64
_CHUNK = 2048


@dataclass(frozen=True)
class ScaleFaults:
    """What is wrong with a scale tensor.

    Attributes:
        name: its name.
        nan: how many values are NaN.
        infinite: how many are infinite, of either sign.
        negative: how many are finite and below zero.
        zero: how many are zero, which over a block of zero weights is good.
        index: where the first fault is that is no zero; the first zero if there is no
            other. int32 counts as four values along the last dimension.
        value: the value there.

    """

    name: str
    nan: int
    infinite: int
    negative: int
    zero: int
    index: tuple[int, ...]
    value: float


def scan_scales(scales: Mapping[str, torch.Tensor]) -> list[ScaleFaults]:
    """Find the scales that are NaN, infinite, negative or zero; waits for the device.

    Args:
        scales: scale tensors of any shape by name, on one accelerator (or on the CPU
            in Triton's interpreter): float32, float16, bfloat16, or exponents alone
            (E8M0) as float8_e8m0fnu, as uint8, or four to an int32. What is not
            contiguous is copied first.

    Returns:
        The faults of each tensor that has any, in the order of `scales`.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a tensor is on another device than the first, on one where Triton
            does not run, or has 2**31 values or more.

    """
    scales = {name: scale for name, scale in scales.items() if scale.numel()}
    if not scales:
        return []
    device = next(iter(scales.values())).device
    for name, scale in scales.items():
        _check(name, scale, device)
    values = {name: _values(scale) for name, scale in scales.items()}
    found = _launch(list(values.values()), device).tolist()
    return [
        _faults(name, values[name].shape, row[3:7], row[7:])
        for name, row in zip(values, found)
        if any(row[3:7])
    ]


def _check(name: str, scale: torch.Tensor, device: torch.device) -> None:
    if scale.dtype not in SCALE_DTYPES:
        known = ", ".join(map(str, _FORMATS))
        raise TypeError(f"scale {name}: expected one of {known}, got {scale.dtype}")
    if scale.device != device:
        raise ValueError(
            f"scale {name}: expected it on {device} as the first, got {scale.device}"
        )
    if scale.is_meta or (scale.is_cpu and not triton.knobs.runtime.interpret):
        raise ValueError(f"scale {name}: expected an accelerator, got {scale.device}")
    values = scale.numel() * (4 if scale.dtype == torch.int32 else 1)
    if values >= _MAX_VALUES:
        raise ValueError(
            f"scale {name}: expected fewer than 2**31 values, got {values}"
        )


def _values(scale: torch.Tensor) -> torch.Tensor:
    """A scale in one piece and with one value an element."""
    scale = scale.detach().contiguous()
    if scale.dtype == torch.int32:
        return torch.atleast_1d(scale).view(torch.uint8)
    return scale


def _launch(values: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Find the faults of each tensor; see `_scan_kernel` for what is returned."""
    none = (0,) * 4 + (NOWHERE.value,) * 4
    rows = [(v.data_ptr(), v.numel(), _FORMATS[v.dtype].value, *none) for v in values]
    table = torch.from_numpy(np.array(rows, dtype=np.int64))
    tensors = table.to(device, non_blocking=True)
    chunks = -(-max(v.numel() for v in values) // _CHUNK)
    grid = (len(values), min(chunks, _MAX_PROGRAMS_PER_TENSOR))
    with torch.cuda.device_of(tensors):
        _scan_kernel[grid](tensors, CHUNK=_CHUNK)
    return tensors


def _faults(
    name: str, shape: torch.Size, counts: list[int], firsts: list[int]
) -> ScaleFaults:
    nan, infinite, negative, zero = counts
    *others, first_zero = firsts
    first = min(others) if nan or infinite or negative else first_zero
    (value,) = struct.unpack("<f", struct.pack("<I", first & 0xFFFFFFFF))
    index = _unravel(first >> 32, shape)
    return ScaleFaults(name, nan, infinite, negative, zero, index, value)


def _unravel(place: int, shape: torch.Size) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        place, i = divmod(place, size)
        index.insert(0, i)
    return tuple(index)


@triton.jit
def _scan_kernel(tensors, CHUNK: tl.constexpr):
    """Count the faults of each tensor by kind, and find the first of each kind.

    Args:
        tensors: [T, 11] int64: address, values and format of each tensor, then four
            counts, of NaN, infinite, negative and zero, and the four firsts of these. A
            first is its flat index above the 32 bits of its value, so that the least is
            the same in every run. Counts come as 0 and firsts as NOWHERE.
        CHUNK: C, a power of two.

    The grid is [T, P]. With C = 2 and P = 2, of a tensor 0 = [1, NaN, 4, 0, 2]:

        program (0, 0) reads [1, NaN], then [2]:  count 1, first 1 << 32 | bits(NaN)
        program (0, 1) reads [4, 0]:              count 1, first 3 << 32 | bits(0)

    """
    tensor = tensors + 11 * tl.program_id(0).to(tl.int64)
    address = tl.load(tensor)
    values = tl.load(tensor + 1)
    scale_format = tl.load(tensor + 2)
    first = tl.program_id(1).to(tl.int64) * CHUNK
    step = tl.num_programs(1).to(tl.int64) * CHUNK
    for start in range(first, values, step):
        index_C = start + tl.arange(0, CHUNK).to(tl.int64)
        exists_C = index_C < values
        bits_C = _float32_bits(address, index_C, exists_C, scale_format)
        bad_C = exists_C & ((bits_C == 0) | (bits_C >= INFINITY))
        if tl.max(bad_C.to(tl.int32)) > 0:
            size_C = bits_C & 0x7FFFFFFF
            finite_C = size_C < INFINITY
            place_C = (index_C << 32) | bits_C.to(tl.int64)
            _record(tensor + 3, bad_C & (size_C > INFINITY), place_C)
            _record(tensor + 4, bad_C & (size_C == INFINITY), place_C)
            _record(tensor + 5, bad_C & finite_C & (size_C > 0), place_C)
            _record(tensor + 6, bad_C & (size_C == 0), place_C)


@triton.jit
def _float32_bits(address, index, exists, scale_format):
    """Load values of any format, each as the bits of the float32 that equals it."""
    if scale_format == FLOAT32:
        words = address.to(tl.pointer_type(tl.uint32))
        bits = tl.load(words + index, mask=exists, other=0)
    elif scale_format == FLOAT16:
        halves = address.to(tl.pointer_type(tl.uint16))
        half = tl.load(halves + index, mask=exists, other=0)
        wide = half.to(tl.float16, bitcast=True).to(tl.float32)
        bits = wide.to(tl.uint32, bitcast=True)
    elif scale_format == BFLOAT16:
        halves = address.to(tl.pointer_type(tl.uint16))
        bits = tl.load(halves + index, mask=exists, other=0).to(tl.uint32) << 16
    else:
        exponents = address.to(tl.pointer_type(tl.uint8))
        exponent = tl.load(exponents + index, mask=exists, other=0).to(tl.uint32)
        bits = exponent << 23
        bits = tl.where(exponent == 0, 0x00400000, bits)  # 2**-127, denormal
        bits = tl.where(exponent == 0xFF, 0x7FC00000, bits).to(tl.uint32)
    return bits


@triton.jit
def _record(counted, found, place):
    count = tl.sum(found.to(tl.int64))
    if count > 0:
        least = tl.min(tl.where(found, place, NOWHERE))
        tl.atomic_add(counted, count, sem="relaxed")
        tl.atomic_min(counted + 4, least, sem="relaxed")
