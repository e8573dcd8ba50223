# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A layer on our kernels is never further from the truth than on the base's."""

import pytest
import torch

from tests.kernels.moe.problems import Experts

pytest.importorskip("vllm.config", reason="needs vLLM")
if not torch.cuda.is_available():
    pytest.skip("the base's kernel needs a GPU", allow_module_level=True)

from tests.kernels.moe.layers import BLOCK, Layer, base_kernels  # noqa: E402

pytestmark = pytest.mark.forked
EXPERTS = Experts(count=128, top_k=8, hidden=2048, intermediate=768)


def exact(layer: Layer, tokens, topk_weights, topk_ids) -> torch.Tensor:
    """[M, H] in float64, where nothing is rounded after the tokens."""
    out = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    for expert in topk_ids.unique().tolist():
        rows, turns = (topk_ids == expert).nonzero(as_tuple=True)
        w13 = _dequantised(layer.w13[expert], layer.w13_scale[expert])
        w2 = _dequantised(layer.w2[expert], layer.w2_scale[expert])
        gate, up = (tokens[rows].double() @ w13.T).chunk(2, 1)
        result = (torch.nn.functional.silu(gate) * up) @ w2.T
        weight = topk_weights[rows, turns].double()[:, None]
        out.index_add_(0, rows, result * weight)
    return out


def _dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    spread = scale.double().repeat_interleave(BLOCK[0], 0)
    return weight.double() * spread.repeat_interleave(BLOCK[1], 1)


def squared_errors(layer: Layer, m: int, seed: int) -> list[float]:
    """Of our kernels and of the base's, on the same tokens."""
    inputs = layer.inputs(m, seed)
    expected = exact(layer, *inputs)
    outs = [layer.run(*inputs)]
    with base_kernels(EXPERTS, m):
        outs.append(layer.run(*inputs))
    return [float((out.double() - expected).square().sum()) for out in outs]


@pytest.mark.parametrize("m", [1, 7, 64, 512, 2048])
def test_error_is_not_above_the_base(m):
    layer = Layer(EXPERTS, torch.device("cuda"))
    # Rounding of one token is a matter of luck; that of hundreds is not.
    draws = [squared_errors(layer, m, seed) for seed in range(512 // m + 1)]
    ours, base = map(sum, zip(*draws))
    assert ours <= base
