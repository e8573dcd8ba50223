# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Names of bad scales that a kernel met, by address and place."""

import math

import pytest
import torch

from vllm.model_executor.layers.fused_moe.scale_watch import BadScale
from vllm.model_executor.model_loader.served_scales import find_scale


def experts(**scales: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, scale in scales.items():
        module.register_parameter(name, torch.nn.Parameter(scale, requires_grad=False))
    return module


def model(layer: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": layer})})


def name_in(layer: torch.nn.Module, parameter: str, *place: int) -> str:
    """Plant a NaN at (expert, block_n, block_k), and name it."""
    scale = layer.get_parameter(parameter)
    scale[place[: scale.dim()]] = math.nan
    bad = BadScale(scale.data_ptr(), *place)
    found = find_scale([model(experts(w=torch.ones(1))), model(layer)], bad)
    assert found is not None and found.tensor is scale
    return str(found.describe(bad))


@pytest.mark.parametrize(
    "parameter, shape, place, shard, where",
    [
        ("w13_weight_scale_inv", (4, 6, 2), (2, 2, 1), "gate", "[2:3, 1:2]"),
        ("w13_weight_scale_inv", (4, 6, 2), (2, 3, 0), "up", "[3:4, 0:1]"),
        ("w2_weight_scale_inv", (4, 2, 3), (3, 1, 2), "down", "[1:2, 2:3]"),
        ("w13_weight_scale", (4, 256, 1), (0, 255, 0), "up", "[255:256, 0:1]"),
        ("w13_weight_scale", (4, 256), (0, 0, 0), "gate", "[0:1]"),
        ("w2_weight_scale", (4,), (1, 0, 0), "down", ""),
    ],
)
def test_names_parameter_expert_shard_block_and_value(
    parameter, shape, place, shard, where
):
    layer = experts(**{parameter: torch.ones(shape)})
    expected = (
        f"mlp.experts.{parameter} expert {place[0]} {shard}: scale is nan, must be "
        "finite and positive"
    )
    assert name_in(layer, parameter, *place) == expected + (where and f" at {where}")


def test_counts_experts_as_the_whole_model_does():
    layer = experts(w2_weight_scale_inv=torch.ones(2, 1, 1))
    layer.register_buffer("expert_map", torch.tensor([-1, 0, -1, 1]))
    named = name_in(layer, "w2_weight_scale_inv", 1, 0, 0)
    assert named.startswith("mlp.experts.w2_weight_scale_inv expert 3 down: ")
    assert named.endswith(" (expert 1 of this rank)")


def test_a_buffer_may_be_a_scale():
    layer = experts()
    layer.register_buffer("w2_weight_scale", torch.ones(4))
    found = find_scale([layer], BadScale(layer.w2_weight_scale.data_ptr(), 0, 0, 0))
    assert found is not None and found.parameter == "w2_weight_scale"


def test_a_tensor_that_no_model_shows():
    hidden = torch.ones(4, 2, 2)
    assert find_scale([model(experts())], BadScale(hidden.data_ptr(), 0, 0, 0)) is None
