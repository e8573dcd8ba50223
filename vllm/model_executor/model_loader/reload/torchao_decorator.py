# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Syncs of high-precision weights into models that torchao quantises."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.config import ModelConfig

from .layerwise import (
    abort_layerwise_reload,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    tensors_sent,
)

__all__ = ["set_torchao_reload_attrs", "support_quantized_model_reload_from_hp_weights"]


def set_torchao_reload_attrs(model: Any, model_config: ModelConfig) -> None:
    """Make every later `load_weights` of `model` a whole sync."""
    model._do_torchao_reload = True
    model._model_config = model_config


def support_quantized_model_reload_from_hp_weights(
    original_load_weights: Callable[..., Any],
) -> Callable[..., Any]:
    """Decorate `AutoWeightsLoader.load_weights` for torchao.

    After `set_torchao_reload_attrs`, a call outside of a sync is one: the weights, in
    high precision and complete, are staged, quantised again and committed.
    """

    @wraps(original_load_weights)
    def load_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = self.module
        in_sync = tensors_sent(model) is not None
        if in_sync or not getattr(model, "_do_torchao_reload", False):
            return original_load_weights(self, *args, **kwargs)
        initialize_layerwise_reload(model, exposed=True)
        try:
            loaded = original_load_weights(self, *args, **kwargs)
            finalize_layerwise_reload(model, model._model_config)
        except BaseException as error:
            abort_layerwise_reload(model, f"loading weights: {error!r}", error)
            raise
        return loaded

    return load_weights
