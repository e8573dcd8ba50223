# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A whole sync into a model without an engine, as a worker does it."""

from collections.abc import Iterable

import torch

from tests.harness.models import Built
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

Weights = Iterable[tuple[str, torch.Tensor]]


def sync_parts(built: Built, parts: Iterable[Weights]) -> None:
    """Send tensors in so many calls of `load_weights`."""
    model, vllm_config = built
    with built.worker_context():
        initialize_layerwise_reload(model)
        for part in parts:
            model.load_weights(part)
        finalize_layerwise_reload(model, vllm_config.model_config)
