# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What comes again after a commit is compared with what was committed."""

import pytest
import torch

from vllm.model_executor.model_loader.reload.errors import WeightSyncError
from vllm.model_executor.model_loader.reload.ledger import Box, Ledger
from vllm.model_executor.model_loader.reload.recording import FirstLoad
from vllm.model_executor.model_loader.reload.staging import StagedTensor, StagingMode


def committed(values: torch.Tensor) -> tuple[StagingMode, torch.Tensor]:
    meta = torch.empty_like(values, device="meta")
    ledger = Ledger([Box.whole(values.shape)])
    device = torch.device("cpu")
    tensor = StagedTensor("layer", "weight", meta, device, FirstLoad(), ledger)
    mode = StagingMode([tensor])
    with mode:
        meta.copy_(values)
    tensor.close()
    return mode, meta


VALUES = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)


@pytest.mark.parametrize("index", [(), (1,), (slice(None), 1), (0, slice(1, 3))])
def test_equal_is_ignored(index):
    mode, meta = committed(VALUES)
    with mode:
        meta[index].copy_(VALUES[index])


@pytest.mark.parametrize("byte", range(VALUES.nbytes))
def test_any_changed_byte_is_refused(byte):
    mode, meta = committed(VALUES)
    other = VALUES.clone()
    other.view(-1).view(torch.uint8)[byte] ^= 1
    with mode, pytest.raises(WeightSyncError, match="other values"):
        meta.copy_(other)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_swapped_order_is_refused(dim):
    mode, meta = committed(VALUES)
    with mode, pytest.raises(WeightSyncError, match="other values"):
        meta.copy_(VALUES.flip(dim))


def test_parts_of_rows_are_refused():
    values = torch.arange(1 << 15).float().reshape(2, 4, -1)
    mode, meta = committed(values)
    with mode, pytest.raises(WeightSyncError, match="in part"):
        meta[:, :, :2].copy_(values[:, :, :2])


def test_equal_scalar_of_a_row_is_ignored():
    mode, meta = committed(torch.tensor([[1.0, 2.0]]))
    with mode:
        meta[0][0].copy_(torch.tensor(1.0))


def test_other_scalar_over_zero_is_refused():
    mode, meta = committed(torch.tensor([[5.0, 0.0]]))
    with mode, pytest.raises(WeightSyncError):
        meta[0][1].copy_(torch.tensor(5.0))


def test_other_values_through_a_square_transpose_are_refused():
    values = torch.arange(16.0).reshape(4, 4)
    mode, meta = committed(values)
    with mode, pytest.raises(WeightSyncError):
        meta.t().copy_(values)
