# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sums of groups of rows, in Triton's interpreter on a CPU and for real on a GPU."""

import pytest
import torch

from vllm.model_executor.kernels import group_sums
from vllm.model_executor.kernels.group_sums import can_sum_groups, sum_groups

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.forked] if DEVICE.type == "cuda" else []

# A group that one program does not finish, nor its last step fill.
LONG = 2 * group_sums._WORDS_OF_PROGRAM + 3


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = (*shape[:-1], shape[-1] * dtype.itemsize)
    data = torch.randint(256, wide, generator=generator, dtype=torch.uint8)
    return data.view(dtype).to(DEVICE)


def expected(tensor: torch.Tensor, rows: int) -> list[int]:
    """By the formula, in integers of any size."""
    row = tensor.shape[-1] * tensor.element_size() // 8
    words = tensor.cpu().view(torch.uint8).view(torch.int64).reshape(-1, rows, row)
    odd = [(k + 1) * group_sums.SPREAD.value | 1 for k in range(max(rows, row))]
    sums = [
        sum(
            (w ^ (w >> 32 & 0xFFFFFFFF)) * odd[i] * odd[r]
            for r, ws in enumerate(group)
            for i, w in enumerate(ws)
        )
        for group in words.tolist()
    ]
    return [(total + 2**63) % 2**64 - 2**63 for total in sums]


CASES = [
    ((3, 8), torch.uint8, 1),
    ((2, 6, 16), torch.float8_e4m3fn, 3),
    ((2, 6, 4), torch.float32, 6),
    ((5, 4, 12), torch.bfloat16, 2),
    ((24,), torch.float32, 1),
    ((2, 2, LONG), torch.int64, 1),
]


def test_sums_of_many_tensors():
    tensors = [random(case[0], case[1], seed) for seed, case in enumerate(CASES)]
    groups = [(tensor, case[2]) for tensor, case in zip(tensors, CASES)]
    got = [sums.tolist() for sums in sum_groups(groups)]
    assert got == [expected(tensor, rows) for tensor, rows in groups]


def test_any_changed_byte_changes_the_sum():
    tensor = random((2, 4, 8), torch.uint8, 1)
    (before,) = sum_groups([(tensor, 4)])
    for index in torch.cartesian_prod(*map(torch.arange, tensor.shape)).tolist():
        changed = tensor.clone()
        changed[tuple(index)] ^= 1 << index[-1]
        (after,) = sum_groups([(changed, 4)])
        differs = [index[0] == 0, index[0] == 1]
        assert (after != before).tolist() == differs, index


def test_no_tensors():
    assert sum_groups([]) == []


@pytest.mark.parametrize("columns, whole_words", [(8, True), (12, False), (3, False)])
def test_takes_rows_of_whole_words(columns, whole_words):
    tensor = random((4, columns), torch.uint8, 1)
    assert can_sum_groups(tensor, 2) == whole_words
    assert not can_sum_groups(tensor.T, 1)
