# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checksums of the tensors that a sync was sent, which a trainer can compute too.

Each rank is sent whole tensors, in checkpoint format, whatever part of them it keeps.
So their checksums depend neither on how the model is split nor on what kernels made of
them. They are taken where tensors come in, before anything is done with them.

A checksum is a sum modulo 2**64. A tensor's bytes in order are little-endian integers
of 64 bits w[r, c] in rows of 4096, with zeros after the last; each counts as

    w[r, c] * ((c + 1) * COLUMN | 1) * ((r + 1) * ROW | 1)

The multipliers are odd, so that any single changed byte changes the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from .bitwise import bytes_of

__all__ = ["SentChecksums", "checksum"]

# Fractional bits of the golden ratio, as a signed integer, and of the root of two.
COLUMN = 0x9E3779B97F4A7C15 - (1 << 64)
ROW = 0x6A09E667F3BCC909
WORDS = 4096
# Rows to take at a time: what a processor's cache holds, or worth a launch.
CPU_ROWS, DEVICE_ROWS = 16, 1024

Named = tuple[str, torch.Tensor]


class SentChecksums:
    """Checksums of what one sync is sent; of what comes twice, of the last.

    Attributes:
        are_all: whether nothing came past them, under names that nobody knows.

    """

    def __init__(self) -> None:
        self.are_all = True
        self._sums: dict[str, torch.Tensor] = {}

    def watch(self, weights: Iterable[Named]) -> Iterable[Named]:
        """Take the checksums of tensors, of a list at once or else as they come."""
        if not isinstance(weights, list | tuple):
            return self._watched(weights)
        for name, tensor in weights:
            self._sums[name] = checksum(tensor)
        return weights

    def as_text(self) -> dict[str, str]:
        """Sixteen hexadecimal digits for each name; waits for the device."""
        values = (int(value) % (1 << 64) for value in self._sums.values())
        return {name: f"{value:016x}" for name, value in zip(self._sums, values)}

    def _watched(self, weights: Iterable[Named]) -> Iterator[Named]:
        for name, tensor in weights:
            self._sums[name] = checksum(tensor)
            yield name, tensor


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The checksum of a tensor of any shape and type, on its device.

    Returns:
        A tensor [] of type int64. It refers to no memory of `tensor`.

    """
    data = bytes_of(tensor)
    rows = CPU_ROWS if data.device.type == "cpu" else DEVICE_ROWS
    width = max(1, min(WORDS, -(-data.numel() // 8)))
    columns = _multipliers(0, width, COLUMN, data.device)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for n, part in enumerate(data.split(rows * WORDS * 8)):
        words = _words(part, width)
        first = n * rows
        factors = _multipliers(first, first + len(words), ROW, data.device)
        total += (_row_sums(words, columns) * factors).sum()
    return total


def _multipliers(
    start: int, stop: int, spread: int, device: torch.device
) -> torch.Tensor:
    return torch.arange(start + 1, stop + 1, device=device) * spread | 1


def _row_sums(words: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    if words.device.type == "cpu":  # no other device multiplies integer matrices
        return words @ columns
    return (words * columns).sum(-1)


def _words(data: torch.Tensor, width: int) -> torch.Tensor:
    """Bytes [n] as integers [rows, width]; copied where they do not fit as they are."""
    padding = -data.numel() % (8 * width)
    if padding:
        data = torch.nn.functional.pad(data, (0, padding))
    elif data.data_ptr() % 8:
        data = data.clone()
    return data.view(torch.int64).reshape(-1, width)
