# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Two tensors are the same if their bytes are, however they are strided."""

import pytest
import torch

from vllm.model_executor.model_loader.reload.bitwise import bytes_of, same_bytes
from vllm.model_executor.model_loader.reload.checksums import checksum

TABLE = torch.arange(512.0).reshape(2, 256)


@pytest.mark.parametrize(
    "tensor",
    [
        TABLE,
        TABLE.T,
        TABLE[:, :1],
        TABLE[1:, 255:],
        TABLE[:, 0].as_strided((1,), (256,)),  # one element that is strided
        TABLE[0, 1],
        TABLE[:0],
    ],
    ids=["whole", "transposed", "column", "corner", "strided", "scalar", "empty"],
)
def test_of_any_shape_and_stride(tensor):
    copy = tensor.clone(memory_format=torch.contiguous_format)
    assert bytes_of(tensor).numpy().tobytes() == copy.numpy().tobytes()
    assert same_bytes(tensor, copy)
    assert torch.equal(checksum(tensor), checksum(copy))
    if tensor.numel():
        assert not same_bytes(tensor, copy + 1000)


def test_nan_is_itself_and_zeros_have_signs():
    nan = torch.tensor([float("nan")])
    assert same_bytes(nan, nan.clone())
    assert not same_bytes(torch.tensor([0.0]), torch.tensor([-0.0]))
