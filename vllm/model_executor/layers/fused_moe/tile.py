# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How the FP8 grouped matrix product is cut into the tiles of its programs.

A tuned configuration has the entries of the base's kernel, and may have more for ours:

    SLICES_N - 2: a tile is two slices of N with an accumulator each; what the matrix
               units return takes half the registers
    TMA_B    - true: weights come through the tensor memory accelerator
    maxnreg  - registers that a thread may use
    SECOND   - entries that replace these in the second product of a layer, the one with
               a row of A for each slot; BLOCK_SIZE_M may be a divisor there
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Tile", "base_config"]

_OURS = ("SLICES_N", "TMA_B", "maxnreg", "SECOND")
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Tile:
    """The part of the output that one program computes.

    Attributes:
        block_m: token slots.
        block_n: output features.
        block_k: input features in one step.
        group_m: tiles in M that follow each other, and share weights in the L2 cache.
        slices_n: equal parts of `block_n` with an accumulator each, 1 or 2.
        tma_b: whether weights come through the tensor memory accelerator.
        options: of Triton's compiler.

    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 1
    slices_n: int = 1
    tma_b: bool = False
    options: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any], is_second: bool = False) -> Tile:
        """Return the tile of a layer's first or second product."""
        if is_second:
            config = {**config, **config.get("SECOND", {})}
        return cls(
            block_m=config["BLOCK_SIZE_M"],
            block_n=config["BLOCK_SIZE_N"],
            block_k=config["BLOCK_SIZE_K"],
            group_m=config["GROUP_SIZE_M"],
            slices_n=config.get("SLICES_N", 1),
            tma_b=config.get("TMA_B", False),
            options={name: config[name] for name in _OPTIONS if name in config},
        )

    def entries(self) -> dict[str, Any]:
        """Return the entries of a configuration that stand for this tile."""
        return {
            "BLOCK_SIZE_M": self.block_m,
            "BLOCK_SIZE_N": self.block_n,
            "BLOCK_SIZE_K": self.block_k,
            "GROUP_SIZE_M": self.group_m,
            "SLICES_N": self.slices_n,
            "TMA_B": self.tma_b,
            **self.options,
        }


def base_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a configuration that the base's kernel takes."""
    return {name: value for name, value in config.items() if name not in _OURS}
