# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Processing staged layers, aside from those that serve."""

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.utils.torch_utils import set_default_torch_dtype

from .commit import Commit, pair_tensors, prepare_commit
from .errors import Finding
from .meta import like, storage_address
from .pristine import Shadow, copy_if_small
from .scales import WrittenScales, invalid_scales, is_scale
from .staging import StagedLayer

__all__ = [
    "is_attention",
    "is_processed",
    "pair_layer",
    "prepare_as_staged",
    "process_layer",
    "process_quantized",
    "unservable",
]


_ATTENTION = AttentionLayerBase, MMEncoderAttention


def is_attention(layer: torch.nn.Module) -> bool:
    """Whether a layer processes itself, after all the others."""
    # In this order: a module takes long to say that it has no such attribute.
    return isinstance(layer, _ATTENTION) and callable(
        getattr(layer, "process_weights_after_loading", None)
    )


def unservable(layers: Iterable[StagedLayer]) -> list[Finding]:
    """What is staged of these layers and must not be served.

    A scale may be invalid. A parameter may have been loaded neither now nor by the
    first load, so that nobody knows its values.
    """
    layers = list(layers)
    unknown = [
        Finding(layer.name, tensor.name, "never loaded, and created without a value")
        for layer in layers
        for tensor in layer.params.values()
        if not tensor.written and tensor.initial is None and tensor.meta.numel()
    ]
    return [*invalid_scales(_written_scales(layers)), *unknown]


def _written_scales(layers: Iterable[StagedLayer]) -> Iterator[WrittenScales]:
    for layer in layers:
        written = {t.name for t in layer.tensors if t.written}
        if any(map(is_scale, written)):
            tensors = {t.name: t.memory for t in layer.tensors if t.memory is not None}
            yield WrittenScales(layer.name, tensors, written)


def is_processed(layer: torch.nn.Module) -> bool:
    """Whether anything is done to a layer's tensors between loading and serving."""
    quant_method = getattr(layer, "quant_method", None)
    if isinstance(quant_method, QuantizeMethodBase):
        process = quant_method.process_weights_after_loading
        nothing = QuantizeMethodBase.process_weights_after_loading
        if getattr(process, "__func__", None) is not nothing:
            return True
    return is_attention(layer)


def prepare_as_staged(staged: StagedLayer) -> Commit:
    """Pair a layer that nothing processes with the one that serves."""
    written = {name: t for name, t in staged.buffers.items() if t.written}
    tensors = (staged.params | written).items()
    new = {name: tensor.materialize() for name, tensor in tensors}
    commit = pair_tensors(staged.name, staged.layer, new)
    commit.copies += _aliases_left_behind(staged)
    commit.as_staged = True
    return commit


def process_layer(
    staged: StagedLayer,
    model_config: ModelConfig | None = None,
    children: Mapping[str, torch.nn.Module] | None = None,
    renew: bool = False,
    watching: AbstractContextManager | None = None,
) -> Shadow:
    """Process a staged layer aside.

    Args:
        staged: the layer, complete and not exposed.
        model_config: for attention layers, which process in the model's dtype.
        children: processed shadows of its children, where they are not yet in service;
            an attention layer may change them.
        renew: whether nothing that serves is valid, so that what is neither loaded
            nor made by processing goes back to its create-time value.
        watching: entered while the layer's quant method processes it.

    """
    # Only processing needs the default device, which costs more than it all.
    with torch._C.DisableTorchFunction():
        shadow = _shadow_of(staged, children or {}, renew)
    # As a cold load does; else what processing makes has another type than what serves.
    with set_default_torch_dtype(staged.info.default_dtype):
        watch: AbstractContextManager = nullcontext() if watching is None else watching
        with watch:
            process_quantized(shadow.layer)
        if is_attention(staged.layer) and model_config is not None:
            process_attention(shadow.layer, model_config)
    return shadow


def pair_layer(staged: StagedLayer, shadow: Shadow, renew: bool = False) -> Commit:
    """Pair a processed layer with the one that serves.

    Args:
        staged: the layer.
        shadow: made of it by `process_layer`.
        renew: as there.

    Raises:
        WeightSyncError: something the processing made has no counterpart to copy to.

    """
    with torch._C.DisableTorchFunction():
        commit = _pair(staged, shadow, renew)
        commit.copies += _aliases_left_behind(staged)
    return commit


def _pair(staged: StagedLayer, shadow: Shadow, renew: bool) -> Commit:
    after = shadow.layer._buffers
    created = staged.info.created if renew else {}
    written = {name for name, tensor in staged.buffers.items() if tensor.written}
    touched = shadow.buffers.touched(after)
    keep = after.keys() - written - set(touched) - created.keys()
    return prepare_commit(staged.name, shadow, keep)


def _aliases_left_behind(
    staged: StagedLayer,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Buffers that no longer share a parameter's memory, and their new values."""
    for alias in staged.info.aliases:
        owner = alias.layer()
        buffer = None if owner is None else owner._buffers.get(alias.buffer)
        param = staged.layer._parameters.get(alias.parameter)
        if buffer is None or param is None:
            continue
        if storage_address(buffer) != storage_address(param):
            memory = staged.params[alias.parameter].materialize()
            yield (
                buffer,
                memory.data.as_strided(alias.shape, alias.stride, alias.offset),
            )


def process_attention(layer: Any, model_config: ModelConfig) -> None:
    """Let an attention layer derive its tensors, in the model's dtype."""
    layer.process_weights_after_loading(model_config.dtype)


def process_quantized(layer: torch.nn.Module) -> None:
    """Let a layer's quant method, if it has one, turn its weights to kernel format."""
    quant_method = getattr(layer, "quant_method", None)
    if not isinstance(quant_method, QuantizeMethodBase):
        return
    quant_method.process_weights_after_loading(layer)
    # Parameters made by processing carry the global rank, not the layer's own.
    update = getattr(layer, "update_param_tp_status", None)
    if update is not None:
        update()


def _serving_params(
    layer: torch.nn.Module, created: Container[str]
) -> dict[str, torch.Tensor | None]:
    """Copies of the parameters that serve, without those that processing has made.

    Processing may write to what it finds, and makes what it does not find.
    """
    return {
        name: None if param is None else like(param.data.clone(), param)
        for name, param in layer._parameters.items()
        if name in created
    }


def _shadow_of(
    staged: StagedLayer, children: Mapping[str, torch.nn.Module], renew: bool
) -> Shadow:
    layer = staged.layer
    # Attention layers that received no scales keep those that serve.
    own = renew or staged.changed or not is_attention(layer)
    params = (
        {name: tensor.processable() for name, tensor in staged.params.items()}
        if own
        else _serving_params(layer, staged.params)
    )
    buffers = {name: copy_if_small(b) for name, b in layer._buffers.items()}
    if renew:
        created = staged.info.created
        buffers |= {
            n: v.to(b) for n, b in buffers.items() if (v := created.get(n)) is not None
        }
    buffers |= {n: t.processable() for n, t in staged.buffers.items() if t.written}
    pristine = staged.info.pristine
    assert pristine is not None, "record_metadata_for_reloading was never called"
    return pristine.shadow(layer, params, buffers, dict(children))
