# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Many copies in one launch, in Triton's interpreter on a CPU and for real on a GPU."""

from math import prod

import numpy as np
import pytest
import torch

from vllm.model_executor.kernels import strided_copy
from vllm.model_executor.kernels.strided import Batch, Strided
from vllm.model_executor.kernels.strided_copy import copy_strided

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.forked] if DEVICE.type == "cuda" else []

COPIES = 3
# A copy that one program does not finish.
LONG = strided_copy._BYTES_OF_PROGRAM + 5


def place(
    shape: list[int], wide: list[int], start: int, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory of random bytes, and a view some elements into it, with gaps."""
    size = (start + prod(wide)) * dtype.itemsize
    random = torch.Generator().manual_seed(seed)
    memory = torch.randint(256, (size,), generator=random, dtype=torch.uint8)
    memory = memory.to(DEVICE)
    view = memory.view(dtype)[start:].view(wide)
    return memory, view[tuple(slice(n) for n in shape)]


def assert_same_bytes(got: torch.Tensor, expected: torch.Tensor) -> None:
    wrong = (got != expected).nonzero().flatten().tolist()
    assert not wrong, (
        f"{len(wrong)} of {got.numel()} bytes differ, first at {wrong[0]}: "
        f"got {got[wrong[0]]}, expected {expected[wrong[0]]}"
    )


def batch(layout: Strided, *copies: tuple[torch.Tensor, torch.Tensor]) -> Batch:
    targets, sources = zip(*((to.data_ptr(), read.data_ptr()) for to, read in copies))
    return layout, np.array(targets), np.array(sources)


@pytest.mark.parametrize("start", [0, 1, 2, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape, source, target",
    [
        ([1], [1], [1]),
        ([LONG], [LONG], [LONG]),
        ([8, 16], [8, 16], [8, 16]),
        ([8, 16], [8, 32], [8, 16]),
        ([7, 5], [9, 11], [7, 13]),
        ([2, 3, 16], [2, 6, 16], [2, 3, 48]),
        ([3, 5, 7], [4, 6, 9], [5, 7, 8]),
    ],
    ids=str,
)
def test_copies_what_torch_copies(shape, source, target, dtype, start):
    reads = [place(shape, source, start, dtype, seed) for seed in range(COPIES)]
    writes = [place(shape, target, start, dtype, COPIES + s) for s in range(COPIES)]
    copies = [(t, s) for (_, t), (_, s) in zip(writes, reads)]
    expected = []
    for (memory, _), (written, read) in zip(writes, copies):
        expected.append(memory.clone())
        view = expected[-1].view(dtype).as_strided(shape, written.stride(), start)
        view.copy_(read)
    target_stride, source_stride = (view.stride() for view in copies[0])
    layout = Strided.of(shape, source_stride, target_stride, dtype.itemsize)
    assert layout is not None
    copy_strided([batch(layout, *copies[:1]), batch(layout, *copies[1:])], DEVICE)
    for (memory, _), wanted in zip(writes, expected):
        assert_same_bytes(memory, wanted)


@pytest.mark.parametrize("run, copies", [(16, 0), (0, 1)])
def test_nothing_to_copy_is_no_launch(run, copies):
    layout = Strided(1, 1, run, 0, 0, 0, 0)
    nowhere = np.zeros(copies, np.int64)
    copy_strided([(layout, nowhere, nowhere)], DEVICE)


@pytest.mark.parametrize(
    "target, source, run, aligned",
    [
        (16, 0, 64, 16),
        (24, 0, 64, 8),
        (0, 6, 64, 2),
        (7, 0, 64, 1),
        (0, 32, 20, 4),
    ],
)
def test_each_run_is_copied_as_it_is_aligned(target, source, run, aligned):
    table_3C = np.array([[target, 0], [source, 0], [run, 48]])
    assert strided_copy._alignment(table_3C).tolist() == [aligned, 16]


@pytest.mark.parametrize("most", [strided_copy._MAX_PROGRAMS, 1, 12])
def test_runs_of_any_size_are_copied_at_once(most, monkeypatch):
    """Also by fewer programs than the longest one has blocks."""
    monkeypatch.setattr(strided_copy, "_MAX_PROGRAMS", most)
    sizes = [16, 48, 20, 1, LONG]
    reads = [place([n], [n], 0, torch.uint8, n) for n in sizes]
    writes = [place([n], [n], 0, torch.uint8, n + 1) for n in sizes]
    batches = [
        batch(Strided(1, 1, n, 0, 0, 0, 0), (to, source))
        for n, (to, _), (source, _) in zip(sizes, writes, reads)
    ]
    copy_strided(batches, DEVICE)
    for (to, _), (source, _) in zip(writes, reads):
        assert_same_bytes(to, source)
