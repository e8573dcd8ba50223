# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Laying out the staged tensors of a whole model."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .derivation import Derivation
from .first_load import original_loader, owed_by, set_loader
from .meta import like
from .placement import ExpertPlacement
from .recording import FirstLoad
from .registry import get_layerwise_info
from .sanitize import restore_layer_refs
from .staging import StagedLayer, StagedLoader, StagedTensor

__all__ = ["stage_model"]


def stage_model(
    modules: Mapping[str, torch.nn.Module],
    first_loaded: bool,
    run: Callable[..., Any],
    placements: Mapping[torch.nn.Module, ExpertPlacement] | None = None,
) -> list[StagedLayer]:
    """A staged layer for each module that has tensors of its own.

    Args:
        modules: all of the model to stage, by qualified name.
        first_loaded: whether a first load told what is owed.
        run: calls the loader of a staged tensor; see `StagedLoader`.
        placements: where experts are, of layers in which they have moved.

    """
    area = _StagingArea(first_loaded, run, placements or {})
    layers = [area.stage(name, layer) for name, layer in modules.items()]
    return [layer for layer in layers if layer is not None]


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

    def stage(self, name: str, layer: torch.nn.Module) -> StagedLayer | None:
        info = get_layerwise_info(layer)
        params, buffers = info.restore_metadata
        if not (params or buffers):
            return None
        staged = StagedLayer(name, layer, info, {}, {}, [])
        for param_name, meta in params.items():
            self._stage_parameter(staged, param_name, meta)
        for buffer_name, meta in buffers.items():
            tensor = self._tensor(staged, buffer_name, meta, is_parameter=False)
            tensor.initial = layer._buffers.get(buffer_name)
            staged.buffers[buffer_name] = tensor
        return staged

    def _stage_parameter(
        self,
        staged: StagedLayer,
        name: str,
        meta: torch.Tensor,
    ) -> None:
        tensor = self._tied.get(id(meta))
        if tensor is None:
            tensor = self._tensor(staged, name, meta, is_parameter=True)
            tensor.initial = staged.info.created.get(name)
            self._tied[id(meta)] = tensor
        else:
            tensor.tied = True
        staged.params[name] = tensor

    def _tensor(
        self,
        staged: StagedLayer,
        name: str,
        captured: torch.Tensor,
        is_parameter: bool,
    ) -> StagedTensor:
        info = staged.info
        meta = restore_layer_refs(like(captured.data, captured), staged.layer)
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
