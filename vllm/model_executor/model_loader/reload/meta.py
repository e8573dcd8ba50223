# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors without memory that stand for a layer's tensors as they were created."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode

from .sanitize import restore_layer_refs, sanitize_layer_refs
from .types import LayerReloadingInfo, LayerTensors
from .utils import get_layer_params_buffers, get_layer_tensors, get_tensor_load_numel

__all__ = [
    "capture_layer_to_meta",
    "get_numel_loaded",
    "like",
    "is_parameter_alias",
    "materialize_layer",
    "materialize_meta_tensor",
    "memory_of",
    "parameter_storages",
    "restore_layer_on_meta",
    "storage_address",
    "to_meta_tensor",
]

# Engines that drive the meta tensors themselves leave these modules and tensors alone.
# Staging needs neither list: it asks what the first load wrote.
SKIP_MODULES = {"HadamardTransform"}
SKIP_LOAD_TENSORS = {
    "_expert_map",
    "e_score_correction_bias",
    "expert_global_to_physical",
    "expert_local_to_global",
    "expert_mask",
    "expert_physical_to_global",
}
SKIP_TENSORS = SKIP_LOAD_TENSORS | {"bias"}


def to_meta_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same class, attributes and geometry, without memory."""
    return like(tensor.data.to("meta"), tensor)


def materialize_meta_tensor(meta_tensor: torch.Tensor) -> torch.Tensor:
    """The reverse, on the default device; the values are uninitialised."""
    return like(memory_of(meta_tensor, None), meta_tensor)


def memory_of(meta_tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """A plain tensor of the same geometry; on the default device if none is given."""
    layout = meta_tensor.shape, meta_tensor.stride()
    return torch.empty_strided(*layout, dtype=meta_tensor.dtype, device=device)


def like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Make `tensor` an instance of the class of `model`, with its attributes."""
    tensor.__class__ = model.__class__
    tensor.__dict__ = dict(model.__dict__)
    return tensor


def parameter_storages(layer: torch.nn.Module) -> set[int]:
    """Addresses of the storages of all parameters of `layer` and its children."""
    return {p for p in map(storage_address, layer.parameters()) if p is not None}


def is_parameter_alias(
    layer: torch.nn.Module, name: str, buffer: torch.Tensor, storages: set[int]
) -> bool:
    """Whether `buffer` is only another view of a parameter's memory."""
    if name not in layer._non_persistent_buffers_set:
        return False
    return storage_address(buffer) in storages


def storage_address(tensor: torch.Tensor) -> int | None:
    """Address of a tensor's storage; None if it has no memory."""
    if isinstance(tensor, UninitializedParameter) or tensor.is_meta:
        return None
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, ValueError):
        return None


def capture_layer_to_meta(layer: torch.nn.Module) -> LayerTensors:
    """Meta copies of a layer's tensors, without references back to the layer."""
    if type(layer).__name__ in SKIP_MODULES:
        return {}, {}
    params, buffers = get_layer_params_buffers(layer)
    # Those of all layers below: of most layers nobody asks.
    storages = parameter_storages(layer) if buffers else set()
    owned = {
        name: buffer
        for name, buffer in buffers.items()
        if not is_parameter_alias(layer, name, buffer, storages)
    }
    return _sanitized(params, layer), _sanitized(owned, layer)


def _sanitized(
    tensors: dict[str, torch.Tensor], layer: torch.nn.Module
) -> dict[str, torch.Tensor]:
    return {
        name: sanitize_layer_refs(to_meta_tensor(tensor), layer)
        for name, tensor in tensors.items()
    }


def restore_layer_on_meta(layer: torch.nn.Module, info: LayerReloadingInfo) -> None:
    """Register a layer's tensors as they were created, on the meta device."""
    if type(layer).__name__ in SKIP_MODULES:
        return
    params, buffers = info.restore_metadata
    transient = set(layer._non_persistent_buffers_set)
    known = get_layer_tensors(layer).keys() | params.keys() | buffers.keys()
    for name in known - SKIP_TENSORS:
        if hasattr(layer, name):
            delattr(layer, name)
    for name in (n for n in params if n not in SKIP_TENSORS):
        param: Any = restore_layer_refs(params[name], layer)
        layer.register_parameter(name, param)
    for name in (n for n in buffers if n not in SKIP_TENSORS):
        tensor = restore_layer_refs(buffers[name], layer)
        layer.register_buffer(name, tensor, persistent=name not in transient)


def materialize_layer(layer: torch.nn.Module, info: LayerReloadingInfo) -> None:
    """Give memory to a layer's meta tensors; others keep theirs, and their values."""
    if type(layer).__name__ in SKIP_MODULES:
        return
    with info.restore_device:
        for name, tensor in get_layer_tensors(layer).items():
            if tensor.is_meta and name not in SKIP_TENSORS:
                setattr(layer, name, materialize_meta_tensor(tensor))


class _CopyCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.numel += args[0].numel()
        return func(*args, **(kwargs or {}))


def get_numel_loaded(
    weight_loader: Callable, args: inspect.BoundArguments
) -> tuple[int, object]:
    """Call a loader and count the elements that it copies, at most its parameter's.

    Returns:
        The count, and what the loader returned.

    """
    with _CopyCounter() as counter:
        result = weight_loader(*args.args, **args.kwargs)
    param = args.arguments.get("param")
    if not isinstance(param, torch.Tensor):
        return counter.numel, result
    return min(counter.numel, get_tensor_load_numel(param)), result
