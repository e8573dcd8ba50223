# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Laying out the staged tensors of a whole model."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .derivation import Derivation
from .first_load import original_loader, owed_by, set_loader
from .meta import to_meta_tensor
from .placement import ExpertPlacement
from .recording import FirstLoad
from .registry import get_layerwise_info
from .sanitize import restore_layer_refs
from .staging import StagedLayer, StagedLoader, StagedTensor
from .types import LayerReloadingInfo

__all__ = ["stage_model"]


def stage_model(
    model: torch.nn.Module,
    first_loaded: bool,
    run: Callable[..., Any],
    placements: Mapping[torch.nn.Module, ExpertPlacement] | None = None,
) -> list[StagedLayer]:
    """A staged layer for each module of `model` that has tensors of its own.

    Args:
        model: the model to stage.
        first_loaded: whether a first load told what is owed.
        run: calls the loader of a staged tensor; see `StagedLoader`.
        placements: where experts are, of layers in which they have moved.

    """
    area = _StagingArea(first_loaded, run, placements or {})
    layers = [area.stage(name, layer) for name, layer in model.named_modules()]
    return [layer for layer in layers if layer.params or layer.buffers]


class _StagingArea:
    def __init__(
        self,
        first_loaded: bool,
        run: Callable[..., Any],
        placements: Mapping[torch.nn.Module, ExpertPlacement],
    ):
        self._first_loaded = first_loaded
        self._run = run
        self._placements = placements
        self._derivation = Derivation()
        self._tied: dict[int, StagedTensor] = {}

    def stage(self, name: str, layer: torch.nn.Module) -> StagedLayer:
        info = get_layerwise_info(layer)
        params, buffers = info.restore_metadata
        staged = StagedLayer(name, layer, {}, {}, [])
        for param_name, meta in params.items():
            self._stage_parameter(staged, info, param_name, meta)
        for buffer_name, meta in buffers.items():
            tensor = self._tensor(staged, info, buffer_name, meta, is_parameter=False)
            tensor.initial = layer._buffers.get(buffer_name)
            staged.buffers[buffer_name] = tensor
        return staged

    def _stage_parameter(
        self,
        staged: StagedLayer,
        info: LayerReloadingInfo,
        name: str,
        meta: torch.Tensor,
    ) -> None:
        tensor = self._tied.get(id(meta))
        if tensor is None:
            tensor = self._tensor(staged, info, name, meta, is_parameter=True)
            tensor.initial = info.created.get(name)
            self._tied[id(meta)] = tensor
        else:
            tensor.tied = True
        staged.params[name] = tensor

    def _tensor(
        self,
        staged: StagedLayer,
        info: LayerReloadingInfo,
        name: str,
        like: torch.Tensor,
        is_parameter: bool,
    ) -> StagedTensor:
        meta = restore_layer_refs(to_meta_tensor(like), staged.layer)
        first_load = info.first_load.get(name)
        if first_load is None:
            first_load = info.first_load[name] = FirstLoad()
        self._derivation.derive(staged.name, name, meta, first_load)
        ledger = owed_by(name, meta, first_load, is_parameter, self._first_loaded)
        device = info.restore_device
        tensor = StagedTensor(staged.name, name, meta, device, first_load, ledger)
        tensor.optional = meta.is_floating_point() and not self._first_loaded
        placement = self._placements.get(staged.layer)
        loader = StagedLoader(original_loader(meta), tensor, self._run, placement)
        set_loader(meta, loader)
        staged.owner_of.append(tensor)
        return tensor
