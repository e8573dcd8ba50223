# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is synced: a model's shape and the bucket it comes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from tests.checkpoints import CASES, Case

__all__ = ["MODELS", "Workload"]

# Layers, experts, hidden and intermediate size; DeepSeek-V3's layers that have experts.
MODELS = {
    "Qwen3-30B-A3B": (48, 128, 2048, 768),
    "Qwen3-235B-A22B": (94, 128, 4096, 1536),
    "DeepSeek-V3": (58, 256, 7168, 2048),
    "Mixtral-8x7B": (32, 8, 4096, 14336),
    "narrow": (8, 128, 128, 128),
}


@dataclass(frozen=True)
class Workload:
    """An FP8 mixture of experts in blocks of 128, and how it is sent.

    Attributes:
        layers: decoder layers.
        experts: experts of each.
        hidden: width of the residual stream.
        intermediate: width of an expert.
        bucket: bytes of the buffer that tensors come through.

    """

    layers: int
    experts: int
    hidden: int
    intermediate: int
    bucket: int

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Workload:
        """Read what `arguments` wrote."""
        return cls(*map(int, arguments))

    @property
    def arguments(self) -> list[str]:
        """This workload as words of a command line."""
        return [str(value) for value in astuple(self)]

    @property
    def case(self) -> Case:
        """The checkpoint."""
        case = CASES["qwen3_moe-fp8_block"]
        sizes = replace(
            case.sizes,
            layers=self.layers,
            experts=self.experts,
            hidden=self.hidden,
            intermediate=self.intermediate,
        )
        return replace(case, sizes=sizes)
