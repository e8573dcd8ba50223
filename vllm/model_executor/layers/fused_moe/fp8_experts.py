# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A layer of gated FP8 experts in two launches.

M - tokens
T - experts each token is routed to (top-k)
E - local experts
H - hidden features
I - intermediate features of an expert
k - features that share a scale
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.fp8_grouped_gemm import (
    Routing,
    fp8_grouped_gemm,
)
from vllm.model_executor.layers.fused_moe.scale_watch import ScaleWatch
from vllm.model_executor.layers.fused_moe.tile import Tile

__all__ = ["GatedExperts", "fp8_gated_experts"]


@dataclass(frozen=True)
class GatedExperts:
    """The weights of a layer's experts.

    Attributes:
        w13: [E, 2 * I, H] FP8, gate and up projection.
        w2: [E, H, I] FP8, down projection.
        w13_scale: [E, 2 * I / n, H / k] float32.
        w2_scale: [E, H / n, I / k] float32.
        block_shape: (n, k).

    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor
    block_shape: tuple[int, int]


def fp8_gated_experts(
    tokens: torch.Tensor,
    tokens_scale: torch.Tensor,
    experts: GatedExperts,
    routing: Routing,
    topk_weights: torch.Tensor | None,
    config: Mapping[str, Any],
    out: torch.Tensor,
    watch: ScaleWatch | None,
) -> None:
    """Run w2(silu(gate) * up); the product in brackets is quantised as it is made.

    Args:
        tokens: [M, H] FP8.
        tokens_scale: [M, H / k] float32.
        experts: the weights.
        routing: which tokens go to which expert.
        topk_weights: [M, T] float32 that outputs are multiplied by, if any.
        config: the tiles of both products.
        out: [M, T, H] bfloat16 or float16, written.
        watch: where a bad weight scale is recorded; None to look at none.

    Raises:
        ValueError: a tensor has another shape, dtype, stride or device.

    """
    m, top_k, _ = out.shape
    intermediate, group = experts.w2.shape[2], experts.block_shape[1]
    gated = tokens.new_empty(m, top_k, intermediate)
    gated_scale = tokens_scale.new_empty(m, top_k, intermediate // group)
    fp8_grouped_gemm(
        tokens,
        experts.w13,
        gated,
        tokens_scale,
        experts.w13_scale,
        routing,
        Tile.of(config),
        experts.block_shape,
        watch=watch,
        c_scale=gated_scale,
    )
    fp8_grouped_gemm(
        gated.flatten(0, 1),
        experts.w2,
        out,
        gated_scale.flatten(0, 1),
        experts.w2_scale,
        replace(routing, top_k=1),
        Tile.of(config, is_second=True),
        experts.block_shape,
        topk_weights=topk_weights,
        watch=watch,
    )
