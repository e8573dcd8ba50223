# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What comes again after a commit is compared with what was committed."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from vllm.model_executor.model_loader.reload import bitwise, fingerprint
from vllm.model_executor.model_loader.reload.errors import WeightSyncError
from vllm.model_executor.model_loader.reload.ledger import Box, Ledger
from vllm.model_executor.model_loader.reload.recording import FirstLoad
from vllm.model_executor.model_loader.reload.staging import (
    StagedTensor,
    StagingMode,
    close,
)


@pytest.fixture(params=["values", "sums", "serving"], autouse=True)
def kept(request, monkeypatch) -> str:
    """What is kept: a tensor as it is, sums of its rows, or nothing, as it serves."""
    if request.param == "sums":
        monkeypatch.setattr(fingerprint, "_SMALL_BYTES", -1)
    return request.param


@pytest.fixture
def are_values_kept(kept) -> bool:
    return kept != "sums"


Committed = Callable[..., tuple[StagingMode, torch.Tensor]]


@pytest.fixture
def committed(kept) -> Committed:
    def commit(values: torch.Tensor, *parts: Any) -> tuple[StagingMode, torch.Tensor]:
        live = torch.stack([values + 1, values])[1]  # in the midst of its memory
        return committed_to(live if kept == "serving" else None, values, *parts)

    return commit


def committed_to(
    live: torch.Tensor | None, values: torch.Tensor, *parts: Any
) -> tuple[StagingMode, torch.Tensor]:
    """A tensor that was written part by part, or as a whole, and may serve."""
    meta = torch.empty_like(values, device="meta")
    ledger = Ledger([Box.whole(values.shape)])
    device = torch.device("cpu")
    tensor = StagedTensor("layer", "weight", meta, device, FirstLoad(), ledger)
    mode = StagingMode([tensor])
    with mode:
        for part in parts or [()]:
            meta[part].copy_(values[part])
    close([tensor], {} if live is None else {id(tensor.memory): live})
    mode.forget(tensor)
    return mode, meta


VALUES = torch.arange(24, dtype=torch.float32).reshape(2, 4, 3)


IN_PART = pytest.raises(WeightSyncError, match="in part")
EXPERTS = [(0,), (1,)]
HALVES = [(e, slice(*half)) for e in (0, 1) for half in ((0, 2), (2, 4))]
ROWS = [(e, i) for e in (0, 1) for i in range(4)]


@pytest.mark.parametrize(
    "parts, index",
    [
        ([()], ()),
        (EXPERTS, ()),
        (EXPERTS, (1,)),
        (HALVES, (1,)),
        (HALVES, (0, slice(0, 2))),
        (HALVES, (1, slice(2, 4))),
        (ROWS, (slice(None), 1)),
        (ROWS, (0, slice(1, 3))),
    ],
)
def test_equal_is_ignored(parts, index, committed):
    mode, meta = committed(VALUES, *parts)
    with mode:
        meta[index].copy_(VALUES[index])


def test_equal_vectors_are_ignored(committed):
    mode, meta = committed(VALUES[0, 0])
    with mode:
        meta.copy_(VALUES[0, 0])


def test_parts_of_what_was_written_together_have_no_sum(are_values_kept, committed):
    mode, meta = committed(VALUES, *HALVES)
    with nullcontext() if are_values_kept else IN_PART, mode:
        meta[1, 1:3].copy_(VALUES[1, 1:3])


@pytest.mark.parametrize("parts", [[()], EXPERTS, HALVES, ROWS])
def test_rows_that_change_places_are_refused(parts, committed):
    mode, meta = committed(VALUES, *parts)
    with mode, pytest.raises(WeightSyncError, match="other values"):
        meta[0].copy_(VALUES[0, [1, 0, 2, 3]])


@pytest.mark.parametrize("byte", range(VALUES.nbytes))
def test_any_changed_byte_is_refused(byte, committed):
    mode, meta = committed(VALUES)
    other = VALUES.clone()
    other.view(-1).view(torch.uint8)[byte] ^= 1
    with mode, pytest.raises(WeightSyncError, match="other values"):
        meta.copy_(other)


@pytest.mark.parametrize("bit", range(64))
@pytest.mark.parametrize("places", [(1, 3), (1, 13), (0, 8, 13, 23), (3, 21)])
def test_changes_of_the_same_bit_do_not_cancel_each_other(places, bit, committed):
    values = torch.arange(48.0).reshape(2, 6, 4)
    mode, meta = committed(values)
    other = values.clone()
    words = other.view(-1).view(torch.int64)
    for place in places:
        words[place] ^= -(1 << 63) if bit == 63 else 1 << bit
    with mode, pytest.raises(WeightSyncError, match="other values"):
        meta.copy_(other)


@pytest.mark.parametrize("offset", [1, 3, 4])
def test_an_equal_tensor_may_lie_anywhere_in_a_bucket(offset, committed):
    values = torch.arange(128, dtype=torch.uint8).reshape(2, 4, 16)
    mode, meta = committed(values)
    bucket = torch.empty(values.numel() + offset, dtype=torch.uint8)
    with mode:
        meta.copy_(bucket[offset:].view(values.shape).copy_(values))


@pytest.mark.parametrize("part_bytes", [1, 12, 60, 1 << 20])
@pytest.mark.parametrize("byte", [None, 0, 50, VALUES.nbytes - 1])
def test_every_part_is_compared(byte, part_bytes, committed, monkeypatch):
    monkeypatch.setattr(bitwise, "_PART_BYTES", part_bytes)
    monkeypatch.setattr(fingerprint, "_chunk_bytes", lambda device: part_bytes)
    mode, meta = committed(VALUES)
    other = VALUES.clone()
    if byte is not None:
        other.view(-1).view(torch.uint8)[byte] ^= 1
    refused = pytest.raises(WeightSyncError, match="other values")
    with nullcontext() if byte is None else refused, mode:
        meta.copy_(other)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_swapped_order_is_refused(dim, committed):
    mode, meta = committed(VALUES)
    with mode, pytest.raises(WeightSyncError, match="other values"):
        meta.copy_(VALUES.flip(dim))


def test_parts_of_rows_have_no_sum(kept, committed):
    values = torch.arange(1 << 15).float().reshape(2, 4, -1)
    mode, meta = committed(values)
    with nullcontext() if kept == "serving" else IN_PART, mode:
        meta[:, :, :2].copy_(values[:, :, :2])


def test_an_equal_scalar_of_a_small_tensor_is_ignored(are_values_kept, committed):
    mode, meta = committed(torch.tensor([[1.0, 2.0]]))
    with nullcontext() if are_values_kept else IN_PART, mode:
        meta[0][0].copy_(torch.tensor(1.0))


def test_other_scalar_over_zero_is_refused(committed):
    mode, meta = committed(torch.tensor([[5.0, 0.0]]))
    with mode, pytest.raises(WeightSyncError):
        meta[0][1].copy_(torch.tensor(5.0))


def test_other_values_through_a_square_transpose_are_refused(committed):
    values = torch.arange(16.0).reshape(4, 4)
    mode, meta = committed(values)
    with mode, pytest.raises(WeightSyncError):
        meta.t().copy_(values)


def test_what_serves_with_other_strides_is_not_asked():
    values = torch.arange(16.0).reshape(4, 4)
    mode, meta = committed_to(values.t().contiguous().t(), values)
    with mode:
        meta.copy_(values)
        with pytest.raises(WeightSyncError, match="other values"):
            meta.copy_(values.t())


def test_a_matrix_product_wraps_as_a_sum_does():
    words = torch.randint(-(2**63), 2**63 - 1, (5, 300))
    multipliers = torch.randint(-(2**63), 2**63 - 1, (300,))
    expected = (words * multipliers).sum(-1)  # what other devices compute
    assert torch.equal(fingerprint._weighted_sums(words, multipliers), expected)


@pytest.mark.parametrize("shape, together", [((2, 6, 16), 3), ((4, 8), 4), ((24,), 1)])
def test_the_kernel_sums_as_torch_does(shape, together):
    group_sums = pytest.importorskip("vllm.model_executor.kernels.group_sums")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or Triton's interpreter")
    values = torch.randn(shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (sums,) = group_sums.sum_groups([(values.to(device), together)])
    assert sums.tolist() == fingerprint._sums(values, together).flatten().tolist()
