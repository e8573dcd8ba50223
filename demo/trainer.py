# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A trainer that pushes weights into a live engine through one reused bucket."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import chunks

BUCKET_BYTES = 1 << 20
BYTES_PER_CHUNK = 1 << 19


class Trainer:
    """Sends weights to the workers of an engine, a chunk an RPC.

    Args:
        llm: The engine, with `demo.worker.BucketWorker` as worker extension.
        bucket: A file of `BUCKET_BYTES` that trainer and workers map.
        cloned: Whether the workers clone each chunk, as RL frameworks do to get round
            what the released vLLM does to a reused bucket.
    """

    def __init__(self, llm: Any, bucket: Path, cloned: bool):
        self._llm = llm
        self._cloned = cloned
        self._bucket = torch.from_file(
            str(bucket), shared=True, size=BUCKET_BYTES, dtype=torch.uint8
        )
        llm.collective_rpc("open_bucket", args=(str(bucket), BUCKET_BYTES))

    def sync(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Push all tensors, and return in how many chunks."""
        self._llm.collective_rpc("start_sync")
        sent = self._send(tensors)
        self._llm.collective_rpc("finish_sync")
        return sent

    def die_half_way(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        """Push the first half, then lose the connection."""
        self._llm.collective_rpc("start_sync")
        self._send(tensors[: len(tensors) // 2])
        self._llm.collective_rpc("lose_trainer")

    def _send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        sent = 0
        for chunk in chunks(tensors, BYTES_PER_CHUNK, self._bucket):
            layout = [(name, *_placement(tensor)) for name, tensor in chunk]
            self._llm.collective_rpc("load_chunk", args=(layout, self._cloned))
            sent += 1
        return sent


def _placement(view: torch.Tensor) -> tuple[str, list[int], int]:
    """Return dtype, shape and first byte of a tensor in the bucket."""
    start = int(view.storage_offset()) * view.element_size()
    return str(view.dtype).removeprefix("torch."), list(view.shape), start
