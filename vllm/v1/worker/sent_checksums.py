# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a worker tells of the tensors that its model was sent."""

from typing import Any

from vllm.model_executor.model_loader.reload.layerwise import sent_checksums
from vllm.v1.worker.weight_report import models_of

__all__ = ["checksums_of_served_model"]


def checksums_of_served_model(worker: Any) -> dict[str, str]:
    """Return the checksums of what serves, see `sent_checksums`."""
    return dict(sent_checksums(models_of(worker)[0]))
