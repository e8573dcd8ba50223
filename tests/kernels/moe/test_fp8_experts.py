# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A layer of gated FP8 experts against a dequantised one in float64.

M - tokens
T - experts each token is routed to
E - experts
H, I - hidden and intermediate features
"""

from dataclasses import replace

import pytest
import torch

from tests.kernels.moe.problems import Problem, problem, route
from vllm.model_executor.layers.fused_moe.fp8_experts import (
    GatedExperts,
    fp8_gated_experts,
)
from vllm.model_executor.layers.fused_moe.scale_watch import ScaleWatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.forked] if DEVICE.type == "cuda" else []
TOKENS = (1, 33) if DEVICE.type == "cpu" else (1, 33, 2048)
BLOCK, H, I = (64, 64), 192, 128  # noqa: E741
CONFIG = dict(
    BLOCK_SIZE_M=64,
    BLOCK_SIZE_N=128,
    BLOCK_SIZE_K=64,
    GROUP_SIZE_M=8,
    SLICES_N=2,
    SECOND={"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "SLICES_N": 1},
)


def layer(m: int) -> tuple[Problem, Problem]:
    """The first product of a layer, and the second with the routing of the first."""
    first = problem(m, 2 * I, H, BLOCK, device=DEVICE)
    first.a_scale /= 100  # so that the activation is not all gate, or none
    second = problem(m, H, I, BLOCK, 1, device=DEVICE, is_second=True)
    return first, replace(second, experts=first.experts, weights=first.weights)


def run(first: Problem, second: Problem, watch: ScaleWatch | None = None):
    experts = GatedExperts(first.b, second.b, first.b_scale, second.b_scale, BLOCK)
    out = torch.full((*first.experts.shape, H), float("nan"), device=DEVICE)
    out, routing = out.bfloat16(), route(first, CONFIG["BLOCK_SIZE_M"])
    fp8_gated_experts(
        first.a, first.a_scale, experts, routing, first.weights, CONFIG, out, watch
    )
    return out.flatten(0, 1)


@pytest.mark.parametrize("m", TOKENS)
def test_layer_equals_the_dequantised_one(m):
    first, second = layer(m)
    gate, up = first.expected().chunk(2, 1)
    gated = torch.nn.functional.silu(gate) * up
    groups = gated.reshape(len(gated), -1, BLOCK[1])
    scale = groups.abs().amax(-1) / 448
    quantised = (groups / scale[..., None]).float().to(torch.float8_e4m3fn)
    exact = replace(second, a=quantised.flatten(1), a_scale=scale.float())
    expected = exact.expected() * first.weights.double().reshape(-1, 1)
    error = (run(first, second).double() - expected).norm() / expected.norm()
    assert error < 2e-2, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_bad_scale_of_either_product_is_named(name):
    first, second = layer(33)
    bad = dict(first=first, second=second)[name]
    bad.b_scale[2, 0, 1] = float("nan")
    watch = ScaleWatch(DEVICE)
    run(first, second, watch)
    torch.accelerator.synchronize() if DEVICE.type == "cuda" else None
    found = watch.poll()
    assert found is not None and found.address == bad.b_scale.data_ptr()
    assert (found.expert, found.block_n, found.block_k) == (2, 0, 1)
