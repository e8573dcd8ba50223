# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""FP8 linear layers on a CPU without FP8 kernels.

Shape suffixes:
    N  output features
    K  input features
"""

import torch
import torch.nn.functional as F

from vllm.logger import init_logger
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    FP8ScaledMMLinearKernel,
    FP8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.layers.quantization.utils.fp8_emulation_utils import (
    can_dequantize,
    dequantize_fp8,
)
from vllm.platforms import current_platform

logger = init_logger(__name__)


class EmulationFP8ScaledMMLinearKernel(FP8ScaledMMLinearKernel):
    """Dequantises the weight at each call and multiplies in the activations' dtype.

    Serves block, tensor and channel scales, FP8 or 16-bit activations. Activations
    are never quantised, so a static `input_scale` is loaded and left unread; an FP8
    kernel's result differs from this one by the rounding of the activations to FP8.

    Weights and scales stay as the checkpoint has them and are read at each call, so
    a weight sync needs no processing here.
    """

    def __init__(self, c: FP8ScaledMMLinearLayerConfig, layer_param_names) -> None:
        super().__init__(c, layer_param_names)
        logger.warning_once(
            "No FP8 linear kernel fits this CPU: FP8 emulation dequantises the "
            "weights at each call, which is slow."
        )

    @classmethod
    def is_supported(cls, compute_capability=None) -> tuple[bool, str | None]:
        """The CPU only: other platforms have kernels or emulations of their own."""
        if current_platform.is_cpu():
            return True, None
        return False, "emulates FP8 on CPUs only"

    @classmethod
    def can_implement(cls, c: FP8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        """FP8 weights with scales that are part of the checkpoint."""
        if can_dequantize(c.weight_quant_key):
            return True, None
        return False, f"cannot dequantise {c.weight_quant_key}"

    # Quantised activations come only to kernels that name an `input_quant_key`.
    def apply_weights(  # type: ignore[override]
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[..., K] to [..., N], in the layer's output dtype."""
        block = self.config.weight_quant_key.scale.group_shape
        block_shape = (block.row, block.col) if block.row > 0 < block.col else None
        weight, scale, _, _ = self._get_layer_params(layer)
        # Quantisation methods without blocks hand the weight over as [K, N].
        weight_NK = weight if block_shape else weight.t()
        weight_NK = dequantize_fp8(weight_NK, scale, x.dtype, block_shape)
        return F.linear(x, weight_NK, bias).to(self.config.out_dtype)

    def _get_layer_params(self, layer) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        """The weight and its scale; scales of the activations are left unread."""
        scale = getattr(layer, "weight_scale_inv", None)
        return layer.weight, layer.weight_scale if scale is None else scale, None, None

    def apply_scaled_mm(self, **_: object) -> torch.Tensor:
        """Part of the interface for quantised activations, which never arise here."""
        raise NotImplementedError("the FP8 emulation does not quantise activations")
