# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors copied together hold what single copies bring, by as few launches."""

import pytest
import torch

from vllm.model_executor.kernels.strided_copy import copy_strided
from vllm.model_executor.model_loader.reload import copying
from vllm.model_executor.model_loader.reload.copying import copy_together

CPU, FP8 = torch.device("cpu"), torch.float8_e4m3fn


class OneByOne(torch.Tensor):
    """A tensor whose memory is for its own operators."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return super().__torch_dispatch__(func, types, args, kwargs or {})


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape).mul(100).to(dtype)


# By name a target, and what is copied to it.
TOGETHER = {
    "float": lambda: (values(4, 6), values(4, 6)),
    "FP8": lambda: (values(3, 5, dtype=FP8), values(3, 5, dtype=FP8)),
    "scalar": lambda: (values(), values()),
    "rows": lambda: (values(8, 6)[2:6], values(4, 6)),
}
APART = {
    "columns": lambda: (values(4, 8)[:, :6], values(4, 6)),
    "transposed": lambda: (values(4, 6), values(6, 4).t()),
    "cast": lambda: (values(4, 6), values(4, 6, dtype=torch.bfloat16)),
    "one for all": lambda: (values(4, 6), values(6)),
    "of a class": lambda: (values(4).as_subclass(OneByOne), values(4)),
}


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """How many copies each launch made, on a CPU that has launches."""
    counts: list[int] = []

    def launch(batches) -> None:
        counts.append(sum(len(targets) for _, targets, _ in batches))
        copy_strided(batches, CPU)

    monkeypatch.setattr(copying, "batch_launcher", lambda device: launch)
    return counts


@pytest.mark.parametrize("launched", [True, False])
def test_tensors_copied_together_hold_what_single_copies_bring(launched, request):
    launches = request.getfixturevalue("launches") if launched else []
    pairs = [make() for make in (*TOGETHER.values(), *APART.values())]
    copy_together(iter(pairs))
    for target, source in pairs:
        assert torch.equal(target.float(), source.float().expand(target.shape))
    assert launches == [len(TOGETHER)] * launched


def test_nothing_is_launched_for_nothing(launches):
    copy_together([])
    copy_together([make() for make in APART.values()])
    assert launches == []


@pytest.mark.parametrize("launched", [True, False])
def test_of_what_is_copied_to_one_place_the_last_counts(launched, request):
    """As to tied weights; of a launch nobody knows which copy is the last."""
    launches = request.getfixturevalue("launches") if launched else []
    target, other, sources = values(4, 6), values(2, 3), [values(4, 6), values(4, 6)]
    copy_together([(target, sources[0]), (other, other + 1), (target, sources[1])])
    assert torch.equal(target, sources[1])
    assert launches == [2] * launched
