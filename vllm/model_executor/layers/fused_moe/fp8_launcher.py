# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Puts the FP8 grouped matrix product in the place of the base's kernel.

M - tokens
T - experts each token is routed to (top-k)
E - local experts
K - input features
N - output features
"""

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

    @wraps(launch_base)
    def launch(
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        A_scale: torch.Tensor | None,
        B_scale: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        sorted_token_ids: torch.Tensor | None,
        expert_ids: torch.Tensor,
        num_tokens_post_padded: torch.Tensor,
        mul_routed_weight: bool,
        top_k: int,
        config: dict[str, Any],
        compute_type: Any,
        use_fp8_w8a8: bool,
        use_int8_w8a8: bool,
        use_int8_w8a16: bool,
        use_int4_w4a16: bool,
        per_channel_quant: bool,
        block_shape: list[int] | None = None,
        B_bias: torch.Tensor | None = None,
    ) -> None:
        routed = sorted_token_ids, expert_ids, num_tokens_post_padded
        if not use_fp8_w8a8 or not _is_covered(A, B, A_scale, B_scale, C, block_shape):
            return launch_base(
                A,
                B,
                C,
                A_scale,
                B_scale,
                topk_weights,
                *routed,
                mul_routed_weight,
                top_k,
                base_config(config),
                compute_type,
                use_fp8_w8a8,
                use_int8_w8a8,
                use_int8_w8a16,
                use_int4_w4a16,
                per_channel_quant,
                block_shape,
                B_bias,
            )
        require_fp8(B.device)
        # Here, since the base imports this module where there is no Triton, too.
        from vllm.model_executor.layers.fused_moe.fp8_grouped_gemm import (
            Routing,
            fp8_grouped_gemm,
        )

        return fp8_grouped_gemm(
            A,
            B,
            C,
            A_scale,
            B_scale,
            Routing(*routed, top_k, config["BLOCK_SIZE_M"]),
            Tile.of(config, is_second=top_k == 1),
            tuple(block_shape) if block_shape else None,
            B_bias,
            topk_weights if mul_routed_weight else None,
            watch_of(B.device),
        )

    return launch


def _is_covered(a, b, a_scale, b_scale, c, block_shape) -> bool:
    """Whether our kernel takes a product; it was written for NVIDIA's FP8."""
    return (
        torch.version.hip is None
        and a.dtype == b.dtype == torch.float8_e4m3fn
        and c.dtype in (torch.bfloat16, torch.float16)
        and all(s is not None and s.dtype == torch.float32 for s in (a_scale, b_scale))
        and (not block_shape or block_shape[1] % 32 == 0)
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
