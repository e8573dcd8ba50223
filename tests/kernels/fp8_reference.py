# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Random FP8 weights in every scale format, and what they mean in float64.

Shape suffixes: N out features, K in features.
"""

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class ScaleFormat:
    """How many elements of a weight share a scale.

    Attributes:
        name: For test ids.
        block: Rows and columns that share a scale; None without blocks.
        channel: One scale a row, [N, 1]; otherwise, without blocks, one a weight.
    """

    name: str
    block: tuple[int, int] | None = None
    channel: bool = False

    def shape(self, n: int, k: int) -> tuple[int, ...]:
        """Shape of the scale of one [N, K] weight."""
        if self.block:
            return -(-n // self.block[0]), -(-k // self.block[1])
        return (n, 1) if self.channel else ()

    def __str__(self) -> str:
        return self.name


BLOCK_128 = ScaleFormat("block128x128", block=(128, 128))
BLOCK_64_32 = ScaleFormat("block64x32", block=(64, 32))
TENSOR = ScaleFormat("tensor")
CHANNEL = ScaleFormat("channel", channel=True)
FORMATS = (BLOCK_128, BLOCK_64_32, TENSOR, CHANNEL)


@dataclass(frozen=True)
class Fp8Matrix:
    """[N, K] float8_e4m3fn and its scale."""

    weight: torch.Tensor
    scale: torch.Tensor
    scale_format: ScaleFormat

    @classmethod
    def random(cls, n: int, k: int, scale_format: ScaleFormat) -> Self:
        """Draw one; scales differ by up to a factor of 16, so that each one counts."""
        weight = torch.randn(n, k).to(torch.float8_e4m3fn)
        scale = torch.exp2(4 * torch.rand(scale_format.shape(n, k)) - 6)
        return cls(weight, scale, scale_format)

    def dequantized(self) -> torch.Tensor:
        """[N, K] float64: each element times the scale that it belongs to."""
        (n, k), block = self.weight.shape, self.scale_format.block
        values = self.weight.double()
        if block is None:
            return values * self.scale.double()
        for i in range(n):
            for j in range(-(-k // block[1])):
                columns = slice(j * block[1], (j + 1) * block[1])
                values[i, columns] *= self.scale[i // block[0], j].double()
        return values


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `want`."""
    return ((got.double() - want).norm() / want.norm()).item()
