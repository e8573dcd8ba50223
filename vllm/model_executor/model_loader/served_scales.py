# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What to call a bad weight scale that a kernel met in a model that serves.

E - local experts
G - experts of the whole model
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vllm.model_executor.layers.fused_moe.scale_watch import BadScale
from vllm.model_executor.model_loader.reload.errors import Finding
from vllm.model_executor.model_loader.reload.scales import describe_blocks
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

__all__ = ["ServedScale", "find_scale"]


@dataclass(frozen=True)
class ServedScale:
    """A scale tensor, [E, ...], where a kernel reads it.

    Attributes:
        model: the model that it belongs to.
        layer: qualified name of its module in that model.
        module: that module.
        parameter: its name in that module.
        tensor: the tensor.

    """

    model: torch.nn.Module
    layer: str
    module: torch.nn.Module
    parameter: str
    tensor: torch.Tensor

    def describe(self, bad: BadScale) -> Finding:
        """A finding about one of its values; reads it, so it waits for the device."""
        index = (bad.expert, bad.block_n, bad.block_k)[: self.tensor.dim()]
        at_index = torch.zeros(self.tensor.shape, dtype=torch.bool)
        at_index[index] = True
        scale = self.tensor.detach()
        (finding,) = describe_blocks(self.layer, self.parameter, scale, at_index)
        return self._in_whole_model(finding, bad.expert)

    def _in_whole_model(self, finding: Finding, local: int) -> Finding:
        """Count the expert as the whole model does, if this rank has a part of it."""
        expert_map = getattr(self.module, "expert_map", None)  # [G]: local, or -1
        if expert_map is None:
            return finding
        (expert,) = (expert_map == local).nonzero()[0].tolist()
        detail = f"{finding.detail} (expert {local} of this rank)"
        return replace(finding, expert=expert, detail=detail)


def find_scale(models: Sequence[torch.nn.Module], bad: BadScale) -> ServedScale | None:
    """The tensor that a kernel read; None if it is none that a model shows."""
    for model in models:
        for layer, module in model.named_modules():
            for name, tensor in get_layer_tensors(module).items():
                if tensor.data_ptr() == bad.address:
                    return ServedScale(model, layer, module, name, tensor)
    return None
