# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""FP8 experts on a CPU without FP8 kernels.

Shape suffixes:
    M  tokens
    T  top-k choices of a token
    R  tokens routed to one expert
    E  experts of this rank
    G  experts of all ranks
    H  hidden features
    I  intermediate features of an expert, on this rank
    O  rows of w13: 2 * I, gate above up
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import vllm.model_executor.layers.fused_moe.config as moe
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import (
    MoEActivation,
    apply_moe_activation,
)
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceNoOP,
)
from vllm.model_executor.layers.quantization.utils.fp8_emulation_utils import (
    can_dequantize,
    dequantize_fp8,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

logger = init_logger(__name__)

# The activations that a CPU build has operators for.
ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)


def routed_tokens(
    topk_ids_MT: torch.Tensor,
    topk_weights_MT: torch.Tensor,
    expert_map_G: torch.Tensor | None,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield each local expert that has tokens, with those tokens.

    Args:
        topk_ids_MT: [M, T] integer, ids among all experts; -1 for no expert.
        topk_weights_MT: [M, T] float.
        expert_map_G: [G] integer, an expert's place on this rank or -1. None where
            every expert is here.

    Yields:
        The expert's place, its tokens [R] int64, their weights [R] float32.
    """
    local_MT = topk_ids_MT
    if expert_map_G is not None:
        local_MT = torch.where(topk_ids_MT < 0, -1, expert_map_G[topk_ids_MT])
    for expert in local_MT[local_MT >= 0].unique().tolist():
        tokens_R, choice_R = (local_MT == expert).nonzero(as_tuple=True)
        yield expert, tokens_R, topk_weights_MT[tokens_R, choice_R].float()


@dataclass(frozen=True)
class Projections:
    """The gate and up, or the down projections of all local experts.

    Attributes:
        weight_ENK: [E, N, K] float8_e4m3fn.
        scale: [E, ...]; what `dequantize_fp8` takes for one weight, for each expert.
        bias_EN: [E, N], or None.
        block_shape: Rows and columns that share a scale; None without blocks.
        stacked: 2 for gate above up, else 1.
    """

    weight_ENK: torch.Tensor
    scale: torch.Tensor
    bias_EN: torch.Tensor | None
    block_shape: tuple[int, int] | None
    stacked: int = 1

    def apply(self, expert: int, x_RK: torch.Tensor) -> torch.Tensor:
        """[R, K] to [R, N], in the dtype of the input."""
        weight_NK = dequantize_fp8(
            self.weight_ENK[expert],
            self.scale[expert],
            x_RK.dtype,
            self.block_shape,
            self.stacked,
        )
        bias_N = None if self.bias_EN is None else self.bias_EN[expert].to(x_RK.dtype)
        return F.linear(x_RK, weight_NK, bias_N)


def activate(
    gate_up_RO: torch.Tensor, activation: MoEActivation, limit: float | None
) -> torch.Tensor:
    """[R, O] to [R, I]. With a limit, SiLU's gate and up are clamped beforehand."""
    gate_RI, up_RI = gate_up_RO.chunk(2, dim=-1)
    if activation is MoEActivation.SILU and limit is not None:
        gate_RI.clamp_(max=limit)
        up_RI.clamp_(-limit, limit)
    return apply_moe_activation(activation, torch.empty_like(up_RI), gate_up_RO)


def fp8_emulation_experts(
    output: torch.Tensor,
    x_MH: torch.Tensor,
    topk_weights_MT: torch.Tensor,
    topk_ids_MT: torch.Tensor,
    expert_map_G: torch.Tensor | None,
    w13_EOH: torch.Tensor,
    w13_scale: torch.Tensor,
    w13_bias_EO: torch.Tensor | None,
    w2_EHI: torch.Tensor,
    w2_scale: torch.Tensor,
    w2_bias_EH: torch.Tensor | None,
    block_shape: list[int] | None,
    activation: str,
    limit: float | None,
) -> None:
    """Write the weighted sum of each token's experts, [M, H], to `output`.

    One expert is dequantised at a time, and only where it has tokens. Products have
    the dtype of `x_MH`; the sum over experts is taken in float32 and rounded once.
    """
    block = (block_shape[0], block_shape[1]) if block_shape else None
    gate_up = Projections(w13_EOH, w13_scale, w13_bias_EO, block, stacked=2)
    down = Projections(w2_EHI, w2_scale, w2_bias_EH, block)
    sum_MH = torch.zeros_like(x_MH, dtype=torch.float32)
    for e, tokens, weights in routed_tokens(topk_ids_MT, topk_weights_MT, expert_map_G):
        gate_up_RO = gate_up.apply(e, x_MH[tokens])
        hidden_RI = activate(gate_up_RO, MoEActivation(activation), limit)
        sum_MH.index_add_(0, tokens, down.apply(e, hidden_RI) * weights[:, None])
    output.copy_(sum_MH)


def _fp8_emulation_experts_fake(output: torch.Tensor, *_: object) -> None:
    """Shapes need no inference: the result is written to `output`."""


# An operator, because torch.compile cannot trace a loop over the experts in use.
direct_register_custom_op(
    op_name="fp8_emulation_experts",
    op_func=fp8_emulation_experts,
    mutates_args=["output"],
    fake_impl=_fp8_emulation_experts_fake,
)


class Fp8EmulationExperts(mk.FusedMoEExpertsModular):
    """Dequantises the experts in use at each call; activations stay as they are.

    Serves block, tensor and channel scales, with or without expert parallelism.
    A static activation scale is loaded and left unread. Weights and scales stay as
    the quantisation method leaves them and are read at each call.
    """

    def __init__(
        self, moe_config: moe.FusedMoEConfig, quant_config: moe.FusedMoEQuantConfig
    ) -> None:
        super().__init__(moe_config, quant_config)
        logger.warning_once(
            "No FP8 MoE kernel fits this CPU: FP8 emulation dequantises the "
            "experts in use at each call, which is slow."
        )

    @property
    def expects_unquantized_inputs(self) -> bool:
        """Whether the step before leaves the activations as they are: yes."""
        return True

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        """Tokens in one [M, H] tensor, not sorted by expert."""
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cpu()

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        """Experts without a gate: vLLM has none on a CPU."""
        return False

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(
        moe_parallel_config: moe.FusedMoEParallelConfig,  # any split of the experts
    ) -> bool:
        return not moe_parallel_config.use_batched_activation_format

    @staticmethod
    def _supports_quant_scheme(
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,  # activations are not quantised
    ) -> bool:
        return can_dequantize(weight_key)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self,
        M: int,  # tokens
        N: int,  # rows of w13
        K: int,  # hidden features
        topk: int,
        global_num_experts: int,  # G
        local_num_experts: int,  # E
        expert_tokens_meta: mk.ExpertTokensMetadata | None,  # left unread
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """No workspaces; the output is [M, K]."""
        return (0,), (0,), (M, K)

    def apply(
        self,
        output: torch.Tensor,  # [M, H]
        hidden_states: torch.Tensor,  # [M, H]
        w1: torch.Tensor,  # [E, O, H], float8_e4m3fn
        w2: torch.Tensor,  # [E, H, I], float8_e4m3fn
        topk_weights: torch.Tensor,  # [M, T]
        topk_ids: torch.Tensor,  # [M, T]
        activation: MoEActivation,
        global_num_experts: int,  # G
        expert_map: torch.Tensor | None,  # [G]
        a1q_scale: torch.Tensor | None,  # None: activations come unquantised
        a2_scale: torch.Tensor | None,  # left unread
        workspace13: torch.Tensor,  # empty
        workspace2: torch.Tensor,  # empty
        expert_tokens_meta: mk.ExpertTokensMetadata | None,  # left unread
        apply_router_weight_on_input: bool,  # then the weights are in the input
    ) -> None:
        """See `fp8_emulation_experts`."""
        if apply_router_weight_on_input:
            topk_weights = torch.ones_like(topk_weights)
        torch.ops.vllm.fp8_emulation_experts(
            output,
            hidden_states,
            topk_weights,
            topk_ids,
            expert_map,
            w1,
            self.w1_scale,
            self.w1_bias,
            w2,
            self.w2_scale,
            self.w2_bias,
            self.block_shape,
            activation.value,
            self.activation_config.clamp_limit,
        )
