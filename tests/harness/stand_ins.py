# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Let FP8 layers load on a CPU without FP8 kernels; none of this runs a forward.

A kernel that the vLLM under test brings itself always comes first, so the layers of a
fork with an emulation load into that emulation.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from vllm import _custom_ops
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.scaled_mm import pytorch as torch_kernels
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.quantization import fp8
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E501
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (  # noqa: E501
    compressed_tensors_moe_w8a8_fp8 as compressed_fp8,
)
from vllm.platforms import PlatformEnum, current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


class _AlwaysSupported:
    @classmethod
    def is_supported(cls, compute_capability: int | None = None):
        return True, None


class BlockLinear(_AlwaysSupported, linear.TritonFp8BlockScaledMMKernel):
    """Holds 128 x 128-block FP8 weights as Triton's kernel does."""


class TensorLinear(
    _AlwaysSupported, torch_kernels.PerTensorTorchFP8ScaledMMLinearKernel
):
    """Holds per-tensor FP8 weights as torch's kernel does."""


class ChannelLinear(
    _AlwaysSupported, torch_kernels.ChannelWiseTorchFP8ScaledMMLinearKernel
):
    """Holds per-channel FP8 weights as torch's kernel does."""


def install(patch: pytest.MonkeyPatch) -> None:
    """Put a stand-in behind everything that loading needs and this machine lacks."""
    if not torch.accelerator.is_available():
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
    if not hasattr(torch.ops._C, "convert_weight_packed"):
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    _append_linear_kernels(patch)
    _fall_back_to_triton_experts(patch, fp8)
    _fall_back_to_triton_experts(patch, compressed_fp8)
    if not hasattr(AttentionBackendEnum, "CPU_MLA"):
        _hold_latent_attention_as_triton_does(patch)
    if current_platform.is_cpu():
        _let_attention_cache_fp8(patch)
    # Some releases take a CPU for a GPU that is too old for FP8.
    patch.setattr(
        CompressedTensorsConfig, "_check_scheme_supported", lambda *_, **__: True
    )
    if not _runs(_custom_ops.scaled_fp8_quant):
        patch.setattr(_custom_ops, "scaled_fp8_quant", _scaled_fp8_quant)


@contextmanager
def no_packing() -> Iterator[None]:
    """Load layers into kernels that serve FP8 weights as checkpoints hold them.

    A CPU with AMX packs them, which takes as much memory again while a layer is
    processed.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        yield


def _append_linear_kernels(patch: pytest.MonkeyPatch) -> None:
    cpu = PlatformEnum.CPU
    for kernels, stand_ins in (
        (linear._POSSIBLE_FP8_BLOCK_KERNELS, [BlockLinear]),
        (linear._POSSIBLE_FP8_KERNELS, [TensorLinear, ChannelLinear]),
    ):
        patch.setitem(kernels, cpu, [*kernels.get(cpu, []), *stand_ins])


def _fall_back_to_triton_experts(patch: pytest.MonkeyPatch, module) -> None:
    select = module.select_fp8_moe_backend

    def select_or_triton(**arguments):
        backend, experts = select(**arguments)
        if backend is Fp8MoeBackend.NONE or _cannot_pack(backend):
            return Fp8MoeBackend.TRITON, TritonExperts
        return backend, experts

    patch.setattr(module, "select_fp8_moe_backend", select_or_triton)


def _cannot_pack(backend: Fp8MoeBackend) -> bool:
    """Whether the CPU backend was chosen, though vLLM's compiled part is missing."""
    is_cpu = backend is Fp8MoeBackend.CPU and current_platform.is_cpu()
    return is_cpu and not hasattr(torch.ops._C, "convert_weight_packed")


def _let_attention_cache_fp8(patch: pytest.MonkeyPatch) -> None:
    """Some releases refuse where the processor could not attend to such a cache."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    supports = classmethod(lambda *_: True)
    patch.setattr(CPUAttentionBackend, "supports_kv_cache_dtype", supports)


def _hold_latent_attention_as_triton_does(patch: pytest.MonkeyPatch) -> None:
    """Give a release whose CPU platform knows no latent attention Triton's."""
    # Where the platform does know it, this module cannot even be imported on a CPU.
    from vllm.v1.attention.backends.mla.prefill import flash_attn

    platform = type(current_platform)
    select = platform.get_attn_backend_cls

    def select_or_triton(*arguments, **keywords) -> str:
        try:
            return select(*arguments, **keywords)
        except NotImplementedError:
            return AttentionBackendEnum.TRITON_MLA.get_path()

    patch.setattr(platform, "get_attn_backend_cls", staticmethod(select_or_triton))
    patch.setattr(platform, "num_compute_units", staticmethod(lambda *_: 1))
    patch.setattr(flash_attn, "flash_attn_varlen_func", _no_forward)


def _no_forward(*_, **__):
    raise NotImplementedError("a stand-in holds weights and runs no forward")


def _runs(scaled_fp8_quant) -> bool:
    try:
        scaled_fp8_quant(torch.ones(16, 16), torch.ones(1))
    except (AttributeError, RuntimeError):
        return False
    return True


def _scaled_fp8_quant(
    input: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [M, N] with one given scale, as vLLM's operator of that name does."""
    scaled = (input.float() / scale).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn), scale
