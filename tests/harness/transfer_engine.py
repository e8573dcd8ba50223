# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Make vLLM's weight transfer engines, on any base."""

from inspect import signature
from typing import Any

import torch

from vllm.config import VllmConfig, WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory

__all__ = ["make_transfer_engine"]


def make_transfer_engine(
    backend: str, device: torch.device, model: Any, config: VllmConfig
) -> Any:
    """Make the engine of a backend, which brings weights to a model on a device."""
    create = WeightTransferEngineFactory.create_engine
    known = {
        "config": WeightTransferConfig(backend=backend),
        "vllm_config": config,
        "parallel_config": config.parallel_config,  # before 0.32
        "device": device,
        "model": model,
    }
    return create(**{name: known[name] for name in signature(create).parameters})
