# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A worker extension, as trainers built on vLLM bring their own.

Arguments come as text, as `/collective_rpc` asks. Each chunk lies in the same file,
which the worker has mapped once.
"""

import json
from typing import Any

import torch

from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)
from vllm.model_executor.model_loader.reload import (
    abort_layerwise_reload,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)


class BucketExtension:
    """Is mixed into the worker."""

    model_runner: Any
    vllm_config: Any
    bucket: torch.Tensor

    def map_bucket(self, path: str, size: str) -> None:
        self.bucket = torch.from_file(path, size=int(size), dtype=torch.uint8)

    def begin_sync(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.model)

    def load_chunk(self, chunk: str) -> None:
        """Load a chunk: JSON of a list of name, dtype, shape and first byte."""
        views = [
            (name, self._view(dtype, shape, start))
            for name, dtype, shape, start in json.loads(chunk)
        ]
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.model.load_weights(views)

    def end_sync(self) -> None:
        config = self.vllm_config.model_config
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model_runner.model, config)

    def drop_sync(self) -> None:
        abort_layerwise_reload(self.model_runner.model, "the trainer gave up")

    @torch.no_grad()
    def copy_kernel_format(self, name: str, *sizes: str) -> None:
        """Copy ones of these sizes, one after the other, to a parameter."""
        weights = [(name, torch.ones(int(size))) for size in sizes]
        self.model_runner.reload_weights(
            weights_iterator=iter(weights), is_checkpoint_format=False
        )

    def patch(self, name: str, index: str, value: str) -> None:
        """Set one element of a tensor, past any sync."""
        weight = self.model_runner.model.get_parameter(name)
        values = torch.tensor([float(value)], dtype=weight.dtype)
        patch = CheckpointWeightPatch(
            name, tuple(weight.shape), weight.dtype, values, torch.tensor([int(index)])
        )
        load_checkpoint_weight_patches(self.model_runner.model, [patch])

    def _view(self, dtype: str, shape: list[int], start: int) -> torch.Tensor:
        kind = getattr(torch, dtype)
        stop = start + torch.Size(shape).numel() * kind.itemsize
        return self.bucket[start:stop].view(kind).view(shape)
