# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Syncs by engines that fill a layer's tensors themselves, past every loader.

Such an engine knows from a dry run where each slice of the checkpoint goes. Its layers
show meta tensors as they were created from start to finish, and it works on each:

    initialize_layerwise_reload(model)      # of this module
    for layer, slices in plan:
        materialize_layer(layer, info)
        ...                                 # write the slices, process the layer
        _copy_and_restore_kernel_tensors(layer, info)
        info.reset()                        # the layer serves again
    finalize_layerwise_reload(model, model_config)

Layers that were not reset keep the values that served. Whether a layer was filled is
the engine's word: neither coverage nor scales are checked here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from weakref import ref

import torch

from vllm.config import ModelConfig
from vllm.logger import init_logger

from .errors import Finding, WeightSyncError
from .layerwise import _model_reload, _place_kernel_tensors, finish_first_load
from .meta import restore_layer_on_meta, to_meta_tensor
from .model_reload import ModelReload
from .processing import is_attention
from .recording import FirstLoad
from .registry import get_layerwise_info
from .scales import is_activation_quantity
from .types import LayerReloadingInfo
from .utils import get_layer_params_buffers

__all__ = ["DirectSync", "initialize_layerwise_reload"]

logger = init_logger(__name__)

NamedLayer = tuple[str, torch.nn.Module]


def initialize_layerwise_reload(model: torch.nn.Module) -> None:
    """Open a sync of an engine that fills the tensors of `model` itself.

    An open sync of the same kind is aborted with a warning: a dry run that failed
    leaves one behind.

    Raises:
        WeightSyncError: a sync through `model.load_weights` is open.

    """
    reload = _model_reload(model)
    running = reload.transaction
    if running is not None and running.is_open:
        if not isinstance(running, DirectSync):
            raise WeightSyncError("another weight sync is open; finish or abort it")
        logger.warning("A weight sync was open and is aborted: another one starts.")
        running.abort("another weight sync was started")
    logger.warning_once(
        "This weight transfer engine fills layers itself. That it brings every weight "
        "and every scale is not checked."
    )
    finish_first_load(model)
    DirectSync(model, reload).open()


class DirectSync:
    """One such sync, in the place of a `ReloadTransaction`.

    It is open as long as any layer of the model is: a dry run resets all of them, and
    nothing else tells that it is over.

    Args:
        model: the model; only a weak reference is kept.
        reload: what is known of its syncs.

    """

    device_bytes = 0  # nothing is staged

    def __init__(self, model: torch.nn.Module, reload: ModelReload):
        self._model = ref(model)
        self._reload = reload

    @property
    def is_open(self) -> bool:
        """Whether a layer may still be filled."""
        return any(self._open_layers())

    @property
    def mixture(self) -> str:
        """How much of the model serves new weights already; empty if nothing does."""
        filled = len(list(self._layers())) - len(list(self._open_layers()))
        return f"{filled} modules have new weights" if filled else ""

    @torch.no_grad()
    def open(self) -> None:
        """Show meta tensors in every layer, and keep those that serve."""
        self._reload.transaction = self
        metas: dict[int, torch.Tensor] = {}
        for _, layer in self._layers():
            info = get_layerwise_info(layer)
            info.kernel_tensors = get_layer_params_buffers(layer)
            info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
            info.staged = self
            restore_layer_on_meta(layer, _with_own_metas(info, metas))

    def finish(self, model_config: ModelConfig | None) -> None:
        """Let attention derive its tensors, and close.

        Raises:
            WeightSyncError: the sync is not open; or the weights had been lost, and the
                engine left layers out.

        """
        left = list(self._open_layers())
        if not left:
            raise WeightSyncError("no weight sync is open, start one first")
        missing = list(self._missing(left)) if self._reload.lost else []
        self._close(left)
        if model_config is not None:
            self._process_attention(model_config)
        if missing:
            raise WeightSyncError("weight sync is incomplete", missing=missing)
        self._reload.checksums = {}
        self._reload.version += 1
        self._reload.lost, self._reload.fenced = "", False
        self._reload.unchecked = "layers that the engine filled itself"

    def abort(self, reason: str, error: BaseException | None = None) -> None:
        """Let the layers that are open serve their old values, and close."""
        left = list(self._open_layers())
        if left and self.mixture:
            self._reload.fenced = True
            self._reload.lost = (
                f"a weight sync ended when {self.mixture}; complete a sync to serve "
                f"again. It ended at {reason}"
            )
        self._close(left)

    def _layers(self) -> Iterator[NamedLayer]:
        model = self._model()
        return iter(()) if model is None else model.named_modules()

    def _open_layers(self) -> Iterator[NamedLayer]:
        for name, layer in self._layers():
            if get_layerwise_info(layer).staged is self:
                yield name, layer

    def _missing(self, left: Iterable[NamedLayer]) -> Iterator[Finding]:
        """Parameters that no filled layer has and that a checkpoint brings."""
        unfilled = {layer for _, layer in left}
        filled = [layer for _, layer in self._layers() if layer not in unfilled]
        tied = {id(param) for layer in filled for param in layer.parameters(False)}
        for layer_name, layer in left:
            info = get_layerwise_info(layer)
            params, _ = info.kernel_tensors or ({}, {})
            for name, param in params.items():
                owed = self._is_owed(name, info) and not is_attention(layer)
                if owed and id(param) not in tied:
                    yield Finding(layer_name, name, "its layer was never filled")

    def _is_owed(self, name: str, info: LayerReloadingInfo) -> bool:
        if self._reload.first_loaded:
            return info.first_load.get(name, FirstLoad()).seen
        return not is_activation_quantity(name)

    def _close(self, left: Iterable[NamedLayer]) -> None:
        for _, layer in left:
            info = get_layerwise_info(layer)
            _place_kernel_tensors(layer, info)
            info.reset()
        self._reload.transaction = None

    @torch.no_grad()
    def _process_attention(self, model_config: ModelConfig) -> None:
        """Attention derives tensors from its children, so all of it comes last."""
        for _, layer in self._layers():
            process = getattr(layer, "process_weights_after_loading", None)
            if process is not None and is_attention(layer):
                process(model_config.dtype)


def _with_own_metas(
    info: LayerReloadingInfo, metas: dict[int, torch.Tensor]
) -> LayerReloadingInfo:
    """Copy the meta tensors: engines hang loaders on them, which hold the layer.

    Args:
        info: what is known of a layer.
        metas: copies by identity of the original, for parameters of several layers.

    """
    params, buffers = (
        {n: metas.setdefault(id(t), to_meta_tensor(t)) for n, t in tensors.items()}
        for tensors in info.restore_metadata
    )
    return replace(info, restore_metadata=(params, buffers))
