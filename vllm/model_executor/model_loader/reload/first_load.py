# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Watching a model's first load, from its creation to the processing of its weights."""

from collections.abc import Callable
from functools import lru_cache, update_wrapper
from typing import Any
from weakref import ref

import torch

from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from .calls import WatchedWeights
from .ledger import Box, Ledger
from .meta import (
    capture_layer_to_meta,
    is_parameter_alias,
    parameter_storages,
    storage_address,
)
from .plan import loaded_by
from .pristine import PristineLayer
from .recording import FirstLoad, RecordingLoader
from .registry import get_layerwise_info
from .scales import is_activation_quantity
from .staging import StagedLoader
from .types import BufferAlias
from .utils import get_layer_tensors, get_tensor_load_numel

__all__ = [
    "finish_recording",
    "original_loader",
    "owed_by",
    "set_loader",
    "start_recording",
]

# Scales of activations, norms and the like: cheap to keep, and all that loaders read.
_MAX_KEPT_BYTES = 1 << 14
_NOTHING_OWED = Ledger([])


def original_loader(tensor: torch.Tensor) -> Callable:
    """The weight loader of a tensor without what this package wraps around it."""
    loader = getattr(tensor, "weight_loader", default_weight_loader)
    while True:
        wrapper = RecordingLoader.of(loader) or loader
        if not isinstance(wrapper, RecordingLoader | StagedLoader):
            return loader
        loader = wrapper.original


def set_loader(tensor: Any, loader: Callable) -> None:
    """Give a tensor a weight loader, which is an attribute that torch cannot know."""
    tensor.weight_loader = loader


def start_recording(model: torch.nn.Module) -> None:
    """Note how the model was created, and from now on how its loaders are called."""
    weights = WatchedWeights()
    device = torch.get_default_device()
    # The default device is a mode that each question goes through.
    with torch._C.DisableTorchFunction():
        metas: dict[int, torch.Tensor] = {}
        for layer in model.modules():
            _capture(layer, device, metas)
            _record_loaders(layer, weights)
        for layer in model.modules():
            _note_aliases(layer)
    _watch(model, weights)


def _watch(model: torch.nn.Module, weights: WatchedWeights) -> None:
    """Note which tensor `model.load_weights` is at, until the first load is over."""
    for layer in model.modules():
        _unwatch(layer)  # a model inside a model is given shorter names
    load_weights: Any = getattr(model, "load_weights", None)
    if load_weights is not None:
        get_layerwise_info(model).loaded_by = loaded_by(model)
        own = vars(model).get("load_weights")
        vars(model)["load_weights"] = _WatchedLoad(load_weights, weights, own)


class _WatchedLoad:
    """A model's `load_weights`, which notes what it is at.

    Args:
        original: what it was.
        watched: notes the weights.
        own: the same, if it was the model's own and not its class's.

    """

    def __init__(
        self, original: Callable, watched: WatchedWeights, own: Callable | None
    ):
        update_wrapper(self, original)
        self.own = own
        self._original = original
        self._watched = watched

    def __call__(self, weights: Any, *args: Any, **kwargs: Any) -> Any:
        return self._original(self._watched.watch(weights), *args, **kwargs)


def _unwatch(layer: torch.nn.Module) -> None:
    watched = vars(layer).get("load_weights")
    if not isinstance(watched, _WatchedLoad):
        return
    del vars(layer)["load_weights"]
    if watched.own is not None:
        vars(layer)["load_weights"] = watched.own


def _capture(
    layer: torch.nn.Module, device: torch.device, metas: dict[int, torch.Tensor]
) -> None:
    info = get_layerwise_info(layer)
    tensors = get_layer_tensors(layer)
    params, buffers = capture_layer_to_meta(layer)
    for name in params:  # a parameter tied to another layer's is one parameter
        params[name] = metas.setdefault(id(tensors[name]), params[name])
    info.restore_metadata = (params, buffers)
    info.restore_device = device
    info.pristine = PristineLayer(layer, tensors)
    info.created = {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in tensors.items()
        if not tensor.is_meta and tensor.nbytes <= _MAX_KEPT_BYTES
    }
    if not info.recording:  # a model inside a model is created, and noted, first
        info.first_load = {}
    info.recording = True
    info.aliases = []


def _note_aliases(layer: torch.nn.Module) -> None:
    if not layer._non_persistent_buffers_set:
        return
    storages = parameter_storages(layer)
    for name in layer._non_persistent_buffers_set:
        buffer = layer._buffers.get(name)
        if buffer is None or not is_parameter_alias(layer, name, buffer, storages):
            continue
        for child in layer.modules():
            for param_name, param in child._parameters.items():
                if param is None or storage_address(param) != storage_address(buffer):
                    continue
                offset = int(buffer.storage_offset() - param.storage_offset())
                shape, stride = tuple(buffer.shape), buffer.stride()
                alias = BufferAlias(param_name, ref(layer), name, shape, stride, offset)
                get_layerwise_info(child).aliases.append(alias)


def _record_loaders(layer: torch.nn.Module, weights: WatchedWeights) -> None:
    info = get_layerwise_info(layer)
    for name, param in layer._parameters.items():
        if param is not None:
            first_load = info.first_load.setdefault(name, FirstLoad())
            _record(name, param, first_load, info.created, weights)


def _record(
    name: str,
    param: torch.Tensor,
    first_load: FirstLoad,
    created: dict[str, torch.Tensor],
    weights: WatchedWeights,
) -> None:
    loader = getattr(param, "weight_loader", default_weight_loader)
    if loader is default_weight_loader:
        # It fills the parameter, if it comes: of a small one the value will tell.
        first_load.bypassed = name not in created
    elif (recording := RecordingLoader.of(loader)) is not None:
        recording.weights = weights
    else:
        recording = RecordingLoader(loader, first_load, param._version, weights)
        set_loader(param, recording.loader())


def finish_recording(model: torch.nn.Module) -> bool:
    """Stop watching; the model's loaders are as they were.

    Returns:
        Whether anything was loaded.

    """
    root = get_layerwise_info(model)
    # One that was never noted may be around a model that was.
    if root.pristine is not None and not root.recording:
        return False
    loaded = False
    for layer in model.modules():
        _unwatch(layer)
        info = get_layerwise_info(layer)
        if not info.recording:
            continue
        info.recording = False
        for name, tensor in get_layer_tensors(layer).items():
            first_load = info.first_load.get(name, FirstLoad())
            recording = RecordingLoader.of(getattr(tensor, "weight_loader", None))
            if recording is not None:
                recording.close(tensor._version)
                set_loader(tensor, recording.original)
                # A write through `data` leaves no trace, and none is no value at all.
                first_load.bypassed |= not (first_load.seen or name in info.created)
            elif not first_load.seen and name in info.created:
                first_load.bypassed = not _same(tensor, info.created[name])
            loaded |= first_load.called
    return loaded


def _same(tensor: torch.Tensor, created: torch.Tensor) -> bool:
    return tensor.shape == created.shape and torch.equal(tensor.cpu(), created)


def owed_by(
    name: str, meta: torch.Tensor, first: FirstLoad, is_parameter: bool, known: bool
) -> Ledger:
    """What a sync owes of a tensor: what the first load wrote.

    Where nothing was loaded before (dummy weights), all of a weight but its declared
    padding, and every weight scale; never scales and zero points of activations.

    Args:
        name: the tensor's name in its layer.
        meta: the tensor in checkpoint format, on the meta device.
        first: how the first load called its loader, and what is known of that.
        is_parameter: whether it is a parameter, not a buffer.
        known: whether a first load was seen.

    """
    if first.owed is not None:
        return first.owed.fresh()
    loadable = is_parameter and not is_activation_quantity(name)
    if not (first.seen if known else loadable):
        return _NOTHING_OWED.fresh()
    slack = meta.numel() - get_tensor_load_numel(meta)
    return _whole(tuple(meta.shape), slack).fresh()


@lru_cache(maxsize=1024)
def _whole(shape: tuple[int, ...], slack: int) -> Ledger:
    """All of a tensor, but for some padding; made once for all that are alike."""
    return Ledger([Box.whole(shape)], slack)
