# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is known of each layer, for as long as the layer lives."""

from weakref import WeakKeyDictionary

import torch

from .types import LayerReloadingInfo

__all__ = ["LAYERWISE_INFO", "get_layerwise_info"]

# Values hold no strong reference to their key, or models would never be freed.
LAYERWISE_INFO: WeakKeyDictionary[torch.nn.Module, LayerReloadingInfo] = (
    WeakKeyDictionary()
)


def get_layerwise_info(layer: torch.nn.Module) -> LayerReloadingInfo:
    """What is known of `layer`; nothing yet, if it was never asked for."""
    info = LAYERWISE_INFO.get(layer)
    if info is None:
        info = LayerReloadingInfo(({}, {}), torch.get_default_device())
        LAYERWISE_INFO[layer] = info
    return info
