# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""FP8 arithmetic in plain torch."""

import pytest
import torch

from tests.kernels.fp8_reference import FORMATS, Fp8Matrix
from vllm import _custom_ops as ops
from vllm.model_executor.layers.quantization.utils.fp8_emulation_utils import (
    FP8_MAX,
    dequantize_fp8,
)
from vllm.platforms import current_platform

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("n, k", [(256, 384), (200, 300), (1, 1)])
@pytest.mark.parametrize("scale_format", FORMATS, ids=str)
def test_dequantize_is_exact_in_float64(scale_format, n, k):
    matrix = Fp8Matrix.random(n, k, scale_format)
    got = dequantize_fp8(matrix.weight, matrix.scale, torch.float32, scale_format.block)
    # The product of an FP8 value and a float32 is rounded once, to float32.
    assert torch.equal(got, matrix.dequantized().float())


@pytest.mark.parametrize("scale_format", FORMATS, ids=str)
def test_stacked_matrices_have_blocks_of_their_own(scale_format):
    gate, up = (Fp8Matrix.random(96, 160, scale_format) for _ in range(2))
    got = dequantize_fp8(
        torch.cat([gate.weight, up.weight]),
        torch.cat([torch.atleast_1d(gate.scale), torch.atleast_1d(up.scale)]),
        torch.float32,
        scale_format.block,
        stacked=2,
    )
    assert torch.equal(got, torch.cat([gate.dequantized(), up.dequantized()]).float())


def test_e8m0_scales_are_powers_of_two_and_nan():
    exponents = torch.tensor([[120], [0xFF]], dtype=torch.uint8)
    scale = exponents.view(torch.float8_e8m0fnu)
    got = dequantize_fp8(torch.ones(4, 2).to(FP8), scale, torch.float32, (2, 2))
    assert got[:2].eq(2.0**-7).all() and got[2:].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("scale_format", FORMATS, ids=str)
def test_bad_scale_shows_in_its_elements_only(scale_format, bad):
    matrix = Fp8Matrix.random(256, 256, scale_format)
    matrix.scale.view(-1)[0] = bad
    got = dequantize_fp8(
        matrix.weight, matrix.scale, torch.bfloat16, scale_format.block
    )
    finite = matrix.dequantized().isfinite()
    assert not finite.all()
    assert torch.equal(got.isfinite(), finite)


@pytest.mark.parametrize(
    "shape, block, stacked",
    [((2, 3), (128, 128), 1), ((4, 2), (128, 128), 1), ((3, 2), (64, 128), 2)],
    ids=["transposed", "rows", "blocks_across_halves"],
)
def test_scale_of_another_shape_is_refused(shape, block, stacked):
    weight = torch.zeros(192, 256).to(FP8)
    with pytest.raises(ValueError, match=r"scale of shape .*: expected \("):
        dequantize_fp8(weight, torch.ones(shape), torch.bfloat16, block, stacked)


def test_row_scales_that_do_not_divide_the_rows_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        dequantize_fp8(torch.zeros(4, 4).to(FP8), torch.ones(3), torch.bfloat16)


cpu_only = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="other platforms have the operator"
)


@cpu_only
@pytest.mark.parametrize("per_token", [False, True])
def test_scaled_fp8_quant_with_a_scale_of_its_own(per_token):
    x = torch.randn(5, 64, dtype=torch.bfloat16) * torch.arange(1, 6)[:, None]
    quantized, scale = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=per_token)
    groups = x.double() if per_token else x.double().reshape(1, -1)
    want = groups.abs().amax(-1, keepdim=True) / FP8_MAX
    torch.testing.assert_close(scale.double(), want if per_token else want[0])
    # Half a unit in the last of four places, of values that are not subnormal.
    error = (quantized.double() * scale.double() - x.double()).abs()
    assert (error <= x.double().abs() / 16 + scale.double() * 2.0**-10).all()


@cpu_only
def test_scaled_fp8_quant_with_a_given_scale_saturates():
    x = torch.tensor([[1.0, -3.0, 1e4, -1e4, float("nan")]])
    quantized, scale = ops.scaled_fp8_quant(x, torch.tensor(2.0))
    assert scale.item() == 2.0
    assert quantized.float()[0, :4].tolist() == [0.5, -1.5, FP8_MAX, -FP8_MAX]
    assert quantized.float()[0, 4].isnan()


@cpu_only
def test_scaled_fp8_quant_of_zeros_is_zero():
    quantized, scale = ops.scaled_fp8_quant(torch.zeros(2, 4))
    assert (quantized.float() == 0).all() and scale > 0


@cpu_only
def test_scaled_fp8_quant_refuses_scales_it_would_misread():
    with pytest.raises(ValueError, match="one value"):
        ops.scaled_fp8_quant(torch.zeros(2, 4), torch.ones(2, 1))
