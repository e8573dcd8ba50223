# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Lets the base's Triton experts run gated FP8 layers in two launches.

M - tokens
T - experts each token is routed to (top-k)
E - local experts
H - hidden features
I - intermediate features of an expert
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fp8_launcher import require_fp8, watch_of
from vllm.model_executor.layers.fused_moe.fused_moe import (
    _prepare_expert_assignment,
    try_get_optimal_moe_config,
)
from vllm.model_executor.layers.fused_moe.tile import Tile
from vllm.model_executor.layers.fused_moe.utils import _resize_cache

__all__ = ["with_gated_fp8"]

Apply = Callable[..., None]


def with_gated_fp8(apply_base: Apply) -> Apply:
    """Wrap `TritonExperts.apply`.

    Layers of SiLU-gated experts with block scales take two launches where a tuned table
    has a tile with gate and up of one block. All others are the base's.
    """

    signature = inspect.signature(apply_base)

    @wraps(apply_base)
    def apply(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs).arguments
        config = _gated_config(**call)
        if config is None:
            apply_base(*args, **kwargs)
        else:
            _apply(config, **call)

    return apply


def _gated_config(
    *, self, hidden_states, w1, w2, topk_ids, activation, a1q_scale, a2_scale, **_
) -> dict[str, Any] | None:
    """Return the configuration of a layer that takes two launches, else None."""
    if not _is_gated_fp8(self, hidden_states, a1q_scale, a2_scale, activation):
        return None
    config = try_get_optimal_moe_config(
        w1.size(),
        w2.size(),
        topk_ids.size(1),
        self.quant_config.config_name(hidden_states.dtype),
        hidden_states.size(0),
        block_shape=self.block_shape,
    )
    tile, block = Tile.of(config), self.block_shape[1]
    is_gated = tile.slices_n == 2 and tile.block_n == 2 * block
    return config if is_gated and w2.size(2) % block == 0 else None


def _is_gated_fp8(experts: Any, tokens, scale, second_scale, activation) -> bool:
    """Whether these are gated experts without anything between their products."""
    quant = experts.quant_config
    between = (
        experts._lora_context,
        experts.w1_bias,
        experts.w2_bias,
        quant.gemm1_clamp_limit,
        experts.moe_config.swiglu_limit,
        second_scale,
    )
    return (
        torch.version.hip is None
        and tokens.dtype == torch.float8_e4m3fn
        and scale is not None
        and quant.use_fp8_w8a8
        and bool(experts.block_shape)
        and not experts.quantization_emulation
        and activation == MoEActivation.SILU
        and all(thing is None for thing in between)
    )


def _apply(config: dict[str, Any], *, self, w1, w2, topk_ids, **call) -> None:
    # Here, since the base imports this module where there is no Triton, too.
    from vllm.model_executor.layers.fused_moe.fp8_experts import (
        GatedExperts,
        fp8_gated_experts,
    )
    from vllm.model_executor.layers.fused_moe.fp8_grouped_gemm import Routing

    require_fp8(w1.device)
    (m, top_k), expert_map = topk_ids.shape, call["expert_map"]
    num_experts = w1.size(0) if expert_map is None else call["global_num_experts"]
    slots, owners, padded = _prepare_expert_assignment(
        topk_ids,
        config,
        m,
        top_k,
        num_experts,
        expert_map,
        block_shape=self.block_shape,
    )
    weights = None if call["apply_router_weight_on_input"] else call["topk_weights"]
    block_shape = tuple(self.block_shape)
    products = _resize_cache(call["workspace2"], (m, top_k, w2.size(1)))
    fp8_gated_experts(
        call["hidden_states"],
        call["a1q_scale"],
        GatedExperts(w1, w2, self.w1_scale, self.w2_scale, block_shape),
        Routing(slots, owners, padded, top_k, config["BLOCK_SIZE_M"]),
        weights,
        config,
        products,
        watch_of(w1.device),
    )
    self.moe_sum(products, call["output"])
