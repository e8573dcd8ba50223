# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which scales are refused."""

import math

import pytest
import torch

from vllm.model_executor.layers.fused_moe import scale_scan
from vllm.model_executor.model_loader.reload import scales
from vllm.model_executor.model_loader.reload.errors import Finding
from vllm.model_executor.model_loader.reload.scales import (
    WrittenScales,
    invalid_scales,
)

FP8, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def found(tensors: dict[str, torch.Tensor]) -> list[Finding]:
    return [*invalid_scales([WrittenScales("layer", tensors, set(tensors))])]


def refused(weight: torch.Tensor, scale: torch.Tensor) -> int:
    return len(found({"weight": weight, "weight_scale": scale}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, -1e-30])
def test_no_number_to_scale_by(value):
    assert refused(torch.zeros(4, 4).to(FP8), torch.tensor([1.0, value])) == 1


@pytest.mark.parametrize("value", [1e-30, 1e-40, 1e30])
def test_any_size_is_valid(value):
    assert refused(torch.ones(4, 4).to(FP8), torch.tensor([value])) == 0


@pytest.mark.parametrize("dtype", [E8M0, torch.uint8])
def test_exponent_255_is_nan(dtype):
    scale = torch.tensor([[0, 127, 255]], dtype=torch.uint8).view(dtype)
    assert refused(torch.ones(4, 12).to(FP8), scale) == 1


# A weight whose only value lies at `row`, and the scale whose zero is at block `zero`.
@pytest.mark.parametrize(
    "rows, scale_shape, row, zero, count",
    [
        pytest.param(256, (2, 1), 200, 0, 0, id="block"),
        pytest.param(256, (2, 1), 100, 0, 1, id="block, not zero"),
        pytest.param(201, (2, 1), 120, 0, 1, id="short last block"),
        pytest.param(201, (2, 1), 120, 1, 0, id="short last block is zero"),
        pytest.param(256, (256, 1), 7, 7, 1, id="channel"),
        pytest.param(256, (256, 1), 7, 8, 0, id="zero channel"),
        pytest.param(256, (1,), 7, 0, 1, id="tensor"),
        pytest.param(256, (), 7, 0, 1, id="scalar"),
    ],
)
def test_zero_needs_a_zero_block(rows, scale_shape, row, zero, count):
    weight = torch.full((rows, 128), -0.0)
    weight[row] = 1
    scale = torch.ones(scale_shape)
    scale.view(-1)[zero] = 0
    assert refused(weight.to(FP8), scale) == count


@pytest.mark.parametrize("zero, count", [(0, 1), (1, 0)])
def test_short_last_block_where_the_count_divides_the_rows(zero, count):
    weight = torch.zeros(192, 128)
    weight[96:128] = 1
    scale = torch.ones(2, 1)
    scale[zero] = 0
    assert refused(weight.to(FP8), scale) == count


def test_experts_are_told_apart():
    weight = torch.zeros(3, 256, 128)
    weight[1, 128:] = 1
    scale = torch.zeros(3, 2)
    scale[1, 0] = 1
    tensors = {"w13_weight": weight.to(FP8), "w13_weight_scale": scale}
    (finding,) = found(tensors)
    assert (finding.expert, finding.shard) == (1, "up")


def test_one_scale_for_each_expert():
    weight = torch.ones(4, 8, 8)
    weight[2:] = 0
    scale = torch.tensor([math.nan, 0, 0, math.nan])
    assert refused(weight.to(FP8), scale) == 3


def test_zero_input_scale():
    assert found({"input_scale": torch.zeros(1)})


def test_zero_scale_of_int8_weight():
    assert refused(torch.ones(4, 4, dtype=torch.int8), torch.zeros(4, 1)) == 4


def test_a_kernel_says_which_to_look_at(monkeypatch):
    """The scan sees what is on an accelerator and of a type it knows."""
    found = scale_scan.ScaleFaults("bad", 1, 0, 0, 0, (0,), math.nan)
    scanned: list[str] = []
    monkeypatch.setattr(scales, "HAS_TRITON", True)

    def scan_scales(given: dict[str, torch.Tensor]) -> list[scale_scan.ScaleFaults]:
        scanned.extend(given)
        return [found]

    monkeypatch.setattr(scale_scan, "scan_scales", scan_scales)
    on_device = {"good": torch.float32, "bad": E8M0, "odd": torch.float8_e4m3fn}
    tensors = {n: torch.empty(1, dtype=t, device="meta") for n, t in on_device.items()}
    tensors["host"] = torch.ones(1)
    assert scales.suspect_scales(tensors) == ["bad", "host", "odd"]
    assert scanned == ["good", "bad"]
