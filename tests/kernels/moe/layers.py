# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A layer of FP8 experts as vLLM runs it, on the fork's kernels or on the base's.

M - tokens
T - experts each token is routed to
H - hidden features
"""

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Iterator
from unittest import mock

import torch

from tests.kernels.moe.problems import Experts, weights
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import fused_moe, override_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
    fp8_w8a8_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.experts import triton_moe
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input

__all__ = ["BLOCK", "Layer", "base_kernels", "checks"]

BLOCK = (128, 128)


class Layer:
    """A layer with random weights.

    Args:
        experts: their sizes.
        device: where it runs.

    """

    def __init__(self, experts: Experts, device: torch.device):
        self.experts = experts
        random = torch.Generator(device).manual_seed(0)
        products = (experts.product(is_second) for is_second in (False, True))
        pairs = [weights(experts.count, *nk, BLOCK, random) for nk in products]
        (self.w13, self.w13_scale), (self.w2, self.w2_scale) = pairs
        for scale in (self.w13_scale, self.w2_scale):
            scale /= 100  # outputs near 1
        quant_config = fp8_w8a8_moe_quant_config(
            self.w13_scale, self.w2_scale, block_shape=list(BLOCK)
        )
        with set_current_vllm_config(VllmConfig()):
            self._triton = TritonExperts(_moe_config(experts, device), quant_config)

    def inputs(self, m: int, seed: int) -> tuple[torch.Tensor, ...]:
        """Tokens [M, H], routing weights [M, T] and experts [M, T]."""
        device = self.w13.device
        random = torch.Generator(device).manual_seed(seed)
        draw = torch.rand(m, self.experts.count, generator=random, device=device)
        topk = draw.topk(self.experts.top_k, 1)
        shape = m, self.experts.hidden
        tokens = torch.randn(shape, generator=random, device=device).bfloat16()
        return tokens, topk.values.softmax(1), topk.indices.int()

    def run(self, tokens, topk_weights, topk_ids) -> torch.Tensor:
        """[M, H], with what vLLM does between a router and its sum."""
        m, hidden = tokens.shape
        (_, n, k), top_k = self.w13.shape, topk_ids.shape[1]
        local = self.experts.count
        shapes = self._triton.workspace_shapes(
            m, n, k, top_k, local, local, None, MoEActivation.SILU
        )
        workspace13, workspace2, out = (tokens.new_empty(shape) for shape in shapes)
        quantised, scale = moe_kernel_quantize_input(
            tokens, None, torch.float8_e4m3fn, False, list(BLOCK)
        )
        self._triton.apply(
            hidden_states=quantised,
            a1q_scale=scale,
            a2_scale=None,
            w1=self.w13,
            w2=self.w2,
            activation=MoEActivation.SILU,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            apply_router_weight_on_input=False,
            expert_map=None,
            expert_tokens_meta=None,
            global_num_experts=local,
            workspace13=workspace13,
            workspace2=workspace2,
            output=out,
        )
        return out


def _moe_config(experts: Experts, device: torch.device) -> FusedMoEConfig:
    names = {field.name for field in dataclasses.fields(FusedMoEConfig)}
    intermediate = "intermediate_size"
    if intermediate not in names:  # before 0.32
        intermediate += "_per_partition"
    return FusedMoEConfig(
        num_experts=experts.count,
        experts_per_token=experts.top_k,
        hidden_dim=experts.hidden,
        num_local_experts=experts.count,
        num_logical_experts=experts.count,
        activation=MoEActivation.SILU,
        device=device,
        routing_method=RoutingMethodType.TopK,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        **{intermediate: experts.intermediate},
    )


@contextlib.contextmanager
def base_kernels(experts: Experts, m: int) -> Iterator[None]:
    """Run layers of so many tokens as the base does, with its own configuration.

    That is its default: it ships no table for these sizes, but where ours replaces it.
    """
    config = fused_moe.get_default_config(
        m,
        experts.count,
        experts.intermediate,
        experts.hidden,
        experts.top_k,
        "fp8_w8a8",
        list(BLOCK),
    )
    launch = inspect.unwrap(triton_moe.invoke_fused_moe_triton_kernel)
    apply = inspect.unwrap(TritonExperts.apply)
    with (
        override_config(config),
        mock.patch.object(triton_moe, "invoke_fused_moe_triton_kernel", launch),
        mock.patch.object(TritonExperts, "apply", apply),
    ):
        yield


def checks(value: str) -> contextlib.AbstractContextManager:
    """Launch kernels with VLLM_MOE_SCALE_CHECK at this value."""
    return mock.patch.dict(os.environ, VLLM_MOE_SCALE_CHECK=value)
