# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Questions about the tensors of one layer."""

from collections.abc import Iterable

import torch

from .types import LayerReloadingInfo, LayerTensors

__all__ = [
    "get_info_size",
    "get_layer_params_buffers",
    "get_layer_size",
    "get_layer_tensors",
    "get_tensor_load_numel",
    "has_device_tensors",
]

_HOST_DEVICES = ("cpu", "meta")


def get_layer_params_buffers(layer: torch.nn.Module) -> LayerTensors:
    """Parameters and buffers registered on `layer` itself, by name."""
    params: dict[str, torch.Tensor] = {
        name: p for name, p in layer._parameters.items() if p is not None
    }
    buffers = {name: b for name, b in layer._buffers.items() if b is not None}
    return params, buffers


def get_layer_tensors(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Both of the above in one mapping."""
    params, buffers = get_layer_params_buffers(layer)
    return {**params, **buffers}


def get_tensor_load_numel(tensor: torch.Tensor) -> int:
    """Elements of `tensor` that a checkpoint fills; its declared padding is not."""
    return getattr(tensor, "weight_loader_numel", tensor.numel())


def get_layer_size(layer: torch.nn.Module) -> int:
    """Elements that a checkpoint may fill in `layer`.

    A size for planners and logs. That a layer is complete is never decided by it.
    """
    from .meta import SKIP_LOAD_TENSORS

    tensors = get_layer_tensors(layer)
    names = tensors.keys() - SKIP_LOAD_TENSORS
    return sum(get_tensor_load_numel(tensors[name]) for name in names)


def has_device_tensors(values: Iterable[object]) -> bool:
    """Whether a tensor among `values` lives on an accelerator."""
    return any(
        isinstance(value, torch.Tensor) and value.device.type not in _HOST_DEVICES
        for value in values
    )


def get_info_size(info: LayerReloadingInfo) -> int:
    """Bytes of accelerator memory that the layer's staging holds."""
    return 0 if info.staged is None else info.staged.device_bytes
