# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Puts the FP8 grouped matrix product in the place of the base's kernel.

M - tokens
T - experts each token is routed to (top-k)
E - local experts
K - input features
N - output features
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.scale_check import ScaleCheck
from vllm.model_executor.layers.fused_moe.scale_watch import ScaleWatch, scale_watch
from vllm.model_executor.layers.fused_moe.tile import Tile, base_config

__all__ = ["require_fp8", "watch_of", "with_fp8_kernel"]

# The first NVIDIA GPUs that multiply FP8.
_FP8_CAPABILITY = (8, 9)


Launcher = Callable[..., None]


def with_fp8_kernel(launch_base: Launcher) -> Launcher:
    """Wrap the base's launcher of the fused MoE kernel.

    FP8 products go to our kernel, and what that does not cover goes to the base's.
    """
    signature = inspect.signature(launch_base)

    @wraps(launch_base)
    def launch(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        if _is_covered(**call.arguments):
            _launch(**call.arguments)
        else:
            call.arguments["config"] = base_config(call.arguments["config"])
            launch_base(*call.args)

    return launch


def _is_covered(*, A, B, C, A_scale, B_scale, use_fp8_w8a8, block_shape, **_) -> bool:
    """Whether our kernel takes a product; it was written for NVIDIA's FP8."""
    return (
        use_fp8_w8a8
        and torch.version.hip is None
        and A.dtype == B.dtype == torch.float8_e4m3fn
        and C.dtype in (torch.bfloat16, torch.float16)
        and all(s is not None and s.dtype == torch.float32 for s in (A_scale, B_scale))
        and (not block_shape or block_shape[1] % 32 == 0)
    )


def _launch(*, A, B, C, A_scale, B_scale, top_k, config, block_shape, **more) -> None:
    # Here, since the base imports this module where there is no Triton, too.
    from vllm.model_executor.layers.fused_moe.fp8_grouped_gemm import (
        Routing,
        fp8_grouped_gemm,
    )

    require_fp8(B.device)
    routing = Routing(
        slots=more["sorted_token_ids"],
        experts=more["expert_ids"],
        padded=more["num_tokens_post_padded"],
        top_k=top_k,
        block_m=config["BLOCK_SIZE_M"],
    )
    fp8_grouped_gemm(
        A,
        B,
        C,
        A_scale,
        B_scale,
        routing,
        Tile.of(config, is_second=top_k == 1),
        tuple(block_shape) if block_shape else None,
        bias=more["B_bias"],
        topk_weights=more["topk_weights"] if more["mul_routed_weight"] else None,
        watch=watch_of(B.device),
    )


def require_fp8(device: torch.device) -> None:
    """Raise NotImplementedError on a GPU that cannot multiply FP8."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        raise NotImplementedError(
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]} and cannot multiply FP8, which takes "
            f"{_FP8_CAPABILITY[0]}.{_FP8_CAPABILITY[1]} or more: dequantise the model, "
            f"or use a kernel for 16-bit activations (Marlin)."
        )


def watch_of(device: torch.device) -> ScaleWatch | None:
    """Return where kernels on a device record bad scales, if anybody looks."""
    if ScaleCheck.from_environment() is ScaleCheck.OFF:
        return None
    return scale_watch(device)
