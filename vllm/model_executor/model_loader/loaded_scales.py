# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether the weight scales of a checkpoint, as loaded, may be served."""

from collections.abc import Iterator

import torch

from vllm.logger import init_logger
from vllm.model_executor.model_loader.reload import WeightSyncError, reload_status
from vllm.model_executor.model_loader.reload.errors import Finding
from vllm.model_executor.model_loader.reload.scales import (
    bad_blocks,
    describe_first,
    suspect_scales,
    weight_of_scale,
)
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

__all__ = ["check_loaded_scales"]

logger = init_logger(__name__)

# What a scale of a whole weight holds until it is loaded. Where a checkpoint has fused
# weights (q, k and v, say), it has one scale for them, and the others stay like this.
_UNSET = torch.finfo(torch.float32).min


def check_loaded_scales(model: torch.nn.Module) -> None:
    """Look for invalid weight scales, in one launch over all layers.

    Call it before weights are processed, when scales have the checkpoint's layout.
    Dummy weights pass.

    Args:
        model: the model, just loaded.

    Raises:
        WeightSyncError: a scale is invalid, and VLLM_MOE_SCALE_CHECK is "raise".

    """
    from vllm.model_executor.layers.fused_moe.scale_check import ScaleCheck

    check = ScaleCheck.from_environment()
    if check is ScaleCheck.OFF or reload_status(model).state == "inconsistent":
        return
    invalid = list(_invalid_scales(model))
    if not invalid:
        return
    error = WeightSyncError("the loaded weights have invalid scales", invalid=invalid)
    if check is ScaleCheck.RAISE:
        raise error
    logger.error("%s", error)


def _invalid_scales(model: torch.nn.Module) -> Iterator[Finding]:
    layers = {name: _tensors(layer) for name, layer in model.named_modules()}
    places = {
        f"{layer}.{name}": (layer, name)
        for layer, tensors in layers.items()
        for name in tensors
        if weight_of_scale(name) in tensors
    }
    scales = {key: layers[layer][name] for key, (layer, name) in places.items()}
    for layer, name in map(places.__getitem__, suspect_scales(scales)):
        yield from _first_of(layer, name, layers[layer])


def _tensors(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    own = get_layer_tensors(layer)
    return {name: tensor.detach() for name, tensor in own.items() if not tensor.is_meta}


def _first_of(
    layer: str, name: str, tensors: dict[str, torch.Tensor]
) -> Iterator[Finding]:
    scale, bad = bad_blocks(tensors, name)
    if scale.dim() < 2:
        bad &= scale != _UNSET
    return describe_first(layer, name, scale, bad)
