# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A copy between two views as what a kernel needs to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Batch", "Strided"]


class Strided(NamedTuple):
    """A copy of `outer` times `rows` runs of `row_bytes`; strides are in bytes."""

    outer: int
    rows: int
    row_bytes: int
    source_outer: int
    source_row: int
    target_outer: int
    target_row: int

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        source: Sequence[int],
        target: Sequence[int],
        itemsize: int,
    ) -> Strided | None:
        """Describe a copy in as few dimensions as it has.

        Example: a gate's half of w13, [I, H] contiguous in both, is one run of I * H.

        Args:
            shape: of both views.
            source: strides of the view that is read, in elements.
            target: strides of the view that is written, in elements.
            itemsize: bytes of an element in both.

        Returns:
            None if a run is less than a dimension, or there are more than two
            dimensions of them.

        """
        dims = [(n, s, t) for n, s, t in zip(shape, source, target) if n != 1]
        merged: list[tuple[int, int, int]] = []
        for n, s, t in sorted(dims, key=lambda dim: dim[2], reverse=True):
            if merged and merged[-1][1:] == (n * s, n * t):
                n *= merged.pop()[0]
            merged.append((n, s, t))
        run, step_s, step_t = merged.pop() if merged else (1, 1, 1)
        if (step_s, step_t) != (1, 1) or len(merged) > 2:
            return None
        (outer, outer_s, outer_t), (rows, row_s, row_t) = [(1, 0, 0)] * (
            2 - len(merged)
        ) + merged
        strides = (n * itemsize for n in (outer_s, row_s, outer_t, row_t))
        return cls(outer, rows, run * itemsize, *strides)


# Copies that are alike: addresses of targets and of sources, [copies] int64 each.
Batch = tuple[Strided, np.ndarray, np.ndarray]
