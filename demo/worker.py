# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The worker's end of a trainer's bucket: what RL frameworks plug into vLLM."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from tests.harness.snapshot import snapshot
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

Layout = list[tuple[str, str, list[int], int]]
"""Name, dtype, shape and first byte of each tensor in the bucket."""


class BucketWorker:
    """A worker extension that loads chunks from a bucket which the trainer rewrites.

    rpc("open_bucket", path, size)
    rpc("start_sync")
    for layout in layouts:
        rpc("load_chunk", layout)
    rpc("finish_sync")
    """

    # Of the worker that vLLM mixes this class into.
    vllm_config: Any
    model_runner: Any

    def open_bucket(self, path: str, size: int) -> None:
        """Map the trainer's bucket, `size` bytes."""
        self.bucket = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)

    def start_sync(self) -> None:
        """Open a sync."""
        initialize_layerwise_reload(self.model_runner.get_model())

    def load_chunk(self, layout: Layout, cloned: bool) -> None:
        """Load what lies in the bucket, or clones of it."""
        self._load(self._tensors(layout, cloned))

    def lose_trainer(self) -> None:
        """Wait for a chunk that does not come."""

        def lost() -> Iterator[tuple[str, torch.Tensor]]:
            raise ConnectionResetError("the trainer went away")
            yield

        self._load(lost())

    def finish_sync(self) -> None:
        """Commit the sync."""
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(
                self.model_runner.get_model(), self.vllm_config.model_config
            )

    def digests(self) -> dict[str, str]:
        """Return a digest of everything the model serves with, by path."""
        held = snapshot(self.model_runner.get_model())
        return {path: _digest(tensor) for path, tensor in held.items()}

    def _load(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(tensors)

    def _tensors(
        self, layout: Layout, cloned: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, dtype_name, shape, start in layout:
            dtype = getattr(torch, dtype_name)
            stop = start + torch.Size(shape).numel() * dtype.itemsize
            tensor = self.bucket[start:stop].view(dtype).view(shape)
            yield name, tensor.clone() if cloned else tensor


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=16).hexdigest()
