# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Syncs of new weights into a model that serves: all of them, exact, or an error.

See `layerwise` for the lifecycle and `transaction` for how a sync is made.
"""

from .errors import WeightSyncError
from .layerwise import (
    abort_layerwise_reload,
    finalize_layerwise_processing,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    mark_inconsistent,
    record_metadata_for_reloading,
    reload_status,
)
from .status import ReloadStatus
from .torchao_decorator import (
    set_torchao_reload_attrs,
    support_quantized_model_reload_from_hp_weights,
)

__all__ = [
    "ReloadStatus",
    "WeightSyncError",
    "abort_layerwise_reload",
    "finalize_layerwise_processing",
    "finalize_layerwise_reload",
    "initialize_layerwise_reload",
    "mark_inconsistent",
    "record_metadata_for_reloading",
    "reload_status",
    "set_torchao_reload_attrs",
    "support_quantized_model_reload_from_hp_weights",
]
