# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The FP8 linear emulation: its numbers, and when it is chosen.

Shape suffixes: M tokens, N out features, K in features.
"""

from logging.handlers import BufferingHandler

import pytest
import torch

import vllm.logger
from tests.kernels.fp8_reference import (
    BLOCK_128,
    CHANNEL,
    FORMATS,
    TENSOR,
    Fp8Matrix,
    ScaleFormat,
    relative_error,
)
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.scaled_mm import emulation
from vllm.model_executor.kernels.linear.scaled_mm.emulation import (
    EmulationFP8ScaledMMLinearKernel,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    QuantKey,
    create_fp8_quant_key,
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
    kFp8StaticTensorSym,
)
from vllm.platforms import PlatformEnum, current_platform

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="emulates FP8 on CPUs only"
)
PARAM_NAMES = ["weight", "weight_scale", "input_scale", "input_scale_ub"]


@pytest.fixture(autouse=True)
def config():
    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        yield


def weight_key(scale_format: ScaleFormat) -> QuantKey:
    if scale_format.block:
        return create_fp8_quant_key(True, GroupShape(*scale_format.block))
    return kFp8StaticChannelSym if scale_format.channel else kFp8StaticTensorSym


def activation_key(scale_format: ScaleFormat) -> QuantKey:
    if scale_format.block:
        return create_fp8_quant_key(False, GroupShape(1, scale_format.block[1]))
    return kFp8DynamicTokenSym if scale_format.channel else kFp8StaticTensorSym


def kernel_config(scale_format: ScaleFormat) -> linear.FP8ScaledMMLinearLayerConfig:
    return linear.FP8ScaledMMLinearLayerConfig(
        weight_quant_key=weight_key(scale_format),
        activation_quant_key=activation_key(scale_format),
        weight_shape=(256, 384),
        input_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
    )


def make_kernel(scale_format: ScaleFormat) -> EmulationFP8ScaledMMLinearKernel:
    return EmulationFP8ScaledMMLinearKernel(kernel_config(scale_format), PARAM_NAMES)


def make_layer(matrix: Fp8Matrix) -> torch.nn.Module:
    """A layer as the quantisation methods leave it after loading."""
    layer = torch.nn.Module()
    if matrix.scale_format.block:
        layer.weight, layer.weight_scale_inv = matrix.weight, matrix.scale
    else:
        layer.weight, layer.weight_scale = matrix.weight.t(), matrix.scale
        layer.input_scale = torch.tensor(1e-6)  # would saturate all activations
    return layer


@pytest.mark.parametrize("m", [1, 7])
@pytest.mark.parametrize("n, k", [(256, 384), (200, 300)])
@pytest.mark.parametrize("scale_format", FORMATS, ids=str)
def test_close_to_float64(scale_format, n, k, m):
    matrix = Fp8Matrix.random(n, k, scale_format)
    x_MK = torch.randn(m, k, dtype=torch.bfloat16)
    got_MN = make_kernel(scale_format).apply_weights(make_layer(matrix), x_MK)
    assert got_MN.dtype == torch.bfloat16
    assert relative_error(got_MN, x_MK.double() @ matrix.dequantized().T) < 1e-2


def test_bias_and_leading_dimensions():
    matrix = Fp8Matrix.random(256, 384, BLOCK_128)
    x = torch.randn(2, 3, 384, dtype=torch.bfloat16)
    bias = 10 * torch.randn(256, dtype=torch.bfloat16)
    got = make_kernel(BLOCK_128).apply_weights(make_layer(matrix), x, bias)
    want = x.double() @ matrix.dequantized().T + bias.double()
    assert got.shape == (2, 3, 256)
    assert relative_error(got, want) < 1e-2


def test_block_scale_under_the_name_of_compressed_tensors():
    matrix = Fp8Matrix.random(256, 384, BLOCK_128)
    layer = torch.nn.Module()
    layer.weight, layer.weight_scale = matrix.weight, matrix.scale
    x_MK = torch.randn(3, 384, dtype=torch.bfloat16)
    got_MN = make_kernel(BLOCK_128).apply_weights(layer, x_MK)
    assert relative_error(got_MN, x_MK.double() @ matrix.dequantized().T) < 1e-2


def test_nan_scale_gives_nan_in_its_block_of_outputs():
    matrix = Fp8Matrix.random(256, 384, BLOCK_128)
    matrix.scale[1, 2] = float("nan")
    x_MK = torch.randn(3, 384, dtype=torch.bfloat16)
    got_MN = make_kernel(BLOCK_128).apply_weights(make_layer(matrix), x_MK)
    assert got_MN[:, 128:].isnan().all() and got_MN[:, :128].isfinite().all()


@pytest.mark.parametrize("scale_format", FORMATS, ids=str)
def test_weights_are_left_alone_and_read_anew_at_each_call(scale_format):
    first, second = (Fp8Matrix.random(256, 384, scale_format) for _ in range(2))
    layer, kernel = make_layer(first), make_kernel(scale_format)
    x_MK = torch.randn(3, 384, dtype=torch.bfloat16)
    weight, bits = layer.weight, layer.weight.view(torch.uint8).clone()

    kernel.process_weights_after_loading(layer)
    before = kernel.apply_weights(layer, x_MK)
    assert layer.weight is weight
    assert torch.equal(layer.weight.view(torch.uint8), bits)

    first.weight.copy_(second.weight)
    first.scale.copy_(second.scale)
    after = kernel.apply_weights(layer, x_MK)
    assert not torch.equal(before, after)
    assert torch.equal(after, kernel.apply_weights(make_layer(second), x_MK))


def test_torch_compile_traces_it():
    kernel = make_kernel(BLOCK_128)
    layer = make_layer(Fp8Matrix.random(256, 384, BLOCK_128))
    x_MK = torch.randn(3, 384, dtype=torch.bfloat16)
    compiled = torch.compile(kernel.apply_weights, fullgraph=True, backend="eager")
    assert torch.equal(compiled(layer, x_MK), kernel.apply_weights(layer, x_MK))


NATIVE_KERNELS = (
    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU],
    linear._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU],
)


@pytest.fixture
def support_native(monkeypatch):
    """Return a switch for what the native CPU kernels say of this machine."""

    def switch(supported: bool) -> None:
        answer = classmethod(lambda cls, compute_capability=None: (supported, "test"))
        for kernels in NATIVE_KERNELS:
            for kernel in set(kernels) - {EmulationFP8ScaledMMLinearKernel}:
                monkeypatch.setattr(kernel, "is_supported", answer)

    return switch


def init_kernel(scale_format: ScaleFormat):
    """Select and build a kernel as the quantisation methods do."""
    return linear.init_fp8_linear_kernel(
        activation_quant_key=activation_key(scale_format),
        weight_quant_key=weight_key(scale_format),
        input_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
        weight_shape=(256, 384),
    )


@pytest.mark.parametrize("scale_format", [BLOCK_128, TENSOR, CHANNEL], ids=str)
def test_steps_aside_for_native_kernels(support_native, scale_format):
    support_native(True)
    kernel = init_kernel(scale_format)
    assert not isinstance(kernel, EmulationFP8ScaledMMLinearKernel)


@pytest.mark.parametrize("scale_format", [BLOCK_128, TENSOR, CHANNEL], ids=str)
def test_chosen_where_nothing_native_fits(support_native, scale_format):
    support_native(False)
    kernel = init_kernel(scale_format)
    assert isinstance(kernel, EmulationFP8ScaledMMLinearKernel)
    matrix = Fp8Matrix.random(256, 384, scale_format)
    x_MK = torch.randn(3, 384, dtype=torch.bfloat16)
    got_MN = kernel.apply_weights(make_layer(matrix), x_MK)
    assert relative_error(got_MN, x_MK.double() @ matrix.dequantized().T) < 1e-2


def test_serves_fp8_weights_with_16_bit_activations():
    kernel = linear.init_wfp8_a16_linear_kernel(
        weight_quant_key=kFp8StaticChannelSym,
        activation_quant_key=kFp8DynamicTokenSym,
        weight_shape=(256, 384),
        input_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
    )
    assert isinstance(kernel, EmulationFP8ScaledMMLinearKernel)


def test_other_platforms_are_refused(monkeypatch):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    supported, reason = EmulationFP8ScaledMMLinearKernel.is_supported()
    assert not supported
    assert reason is not None and "CPU" in reason


def test_warns_once():
    vllm.logger._print_warning_once.cache_clear()
    handler = BufferingHandler(capacity=10)
    emulation.logger.addHandler(handler)
    try:
        make_kernel(BLOCK_128)
        make_kernel(CHANNEL)
    finally:
        emulation.logger.removeHandler(handler)
    assert [r.levelname for r in handler.buffer] == ["WARNING"]
    assert "FP8 emulation" in handler.buffer[0].getMessage()
