# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a kernel is told of a copy is the copy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm.model_executor.kernels.strided import Strided


def carry_out(layout: Strided, source: bytes, target: bytearray) -> None:
    """Copy run by run, as the description says."""
    for outer in range(layout.outer):
        for row in range(layout.rows):
            read = outer * layout.source_outer + row * layout.source_row
            written = outer * layout.target_outer + row * layout.target_row
            run = source[read : read + layout.row_bytes]
            target[written : written + layout.row_bytes] = run


@st.composite
def views(draw, shape: list[int]) -> torch.Tensor:
    """A view of this shape that begins where its memory does, with gaps."""
    gaps = draw(st.lists(st.integers(0, 2), min_size=len(shape), max_size=len(shape)))
    order = draw(st.permutations(range(len(shape))))
    wide = torch.zeros([shape[d] + gaps[d] for d in order], dtype=torch.int16)
    wide = wide.permute([order.index(d) for d in range(len(shape))])
    return wide[tuple(slice(n) for n in shape)]


@given(st.data())
def test_runs_are_what_a_copy_writes(data):
    shape = data.draw(st.lists(st.integers(1, 3), max_size=4))
    source, target = (data.draw(views(shape)) for _ in range(2))
    memory = source.untyped_storage()
    values = torch.arange(memory.nbytes() // 2, dtype=torch.int16)
    source.set_(values.untyped_storage(), 0, source.shape, source.stride())
    layout = Strided.of(shape, source.stride(), target.stride(), 2)
    if layout is None:
        return
    written = bytearray(target.untyped_storage().nbytes())
    carry_out(layout, values.numpy().tobytes(), written)
    target.copy_(source)
    assert bytes(written) == bytes(target.untyped_storage())


@pytest.mark.parametrize(
    "shape, source, target, runs",
    [
        ([], [], [], (1, 1, 2)),
        ([4, 6], [6, 1], [6, 1], (1, 1, 48)),
        ([4, 6], [6, 1], [12, 1], (1, 4, 12)),
        ([2, 4, 6], [24, 6, 1], [48, 6, 1], (1, 2, 48)),
        ([2, 4, 6], [24, 6, 1], [96, 12, 1], (2, 4, 12)),
        ([1, 4, 6], [99, 6, 1], [7, 6, 1], (1, 1, 48)),
    ],
)
def test_what_is_in_one_piece_is_one_run(shape, source, target, runs):
    layout = Strided.of(shape, source, target, itemsize=2)
    assert layout is not None and layout[:3] == runs


@pytest.mark.parametrize(
    "shape, source, target",
    [
        ([4, 6], [1, 4], [6, 1]),
        ([4, 6], [0, 0], [6, 1]),
        ([2, 2, 2, 2], [64, 32, 16, 1], [99, 49, 9, 1]),
    ],
    ids=["transposed", "broadcast", "4-D"],
)
def test_what_is_no_run_or_has_too_many_dimensions_is_not_described(
    shape, source, target
):
    assert Strided.of(shape, source, target, itemsize=2) is None
