# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Weights from a trainer on the same host, through shared memory, on any device.

The trainer makes one bucket and uses it again for each chunk:

    init_weight_transfer_engine({"segment": name of the bucket})
    start_weight_update()
    for chunk in chunks:                # written to the bucket
        update_weights({"segment": ..., "names": [...], "dtype_names": [...],
                        "shapes": [[...]], "offsets": [...]})
    finish_weight_update()

Nothing of it is unpickled: requests are plain lists, and the bucket holds the tensors'
bytes alone. Each rank reads what it needs before `update_weights` returns. Each update
names the bucket again, so that two trainers cannot take one another's for their own.
`examples/rl/shm_trainer.py` is a trainer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.shm_bucket import Bucket
from vllm.distributed.weight_transfer.shm_layout import placements

try:
    from vllm.model_executor.model_loader.mtp_validation import (
        disable_mtp_completeness_check as load_in_parts,
    )
except ImportError:  # before 0.32, which checks no such thing
    from contextlib import nullcontext as load_in_parts  # type: ignore[assignment]

__all__ = ["SharedMemoryWeightTransferEngine"]

LoadWeights = Callable[[list[tuple[str, torch.Tensor]]], Any]


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """What a trainer says at first.

    Attributes:
        segment: name of its bucket, see `Bucket`.

    """

    segment: str


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """What a trainer says of a chunk.

    Attributes:
        segment: name of its bucket.
        names: of the tensors, in the checkpoint.
        dtype_names: of the tensors, such as "bfloat16".
        shapes: of the tensors, which are contiguous.
        offsets: first byte of each tensor in the bucket, a multiple of its element
            size.

    """

    segment: str
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]


class SharedMemoryWeightTransferEngine(
    WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]
):
    """Loads what a trainer on the same host wrote to its bucket."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    # Not in a constructor: its arguments differ between versions of vLLM.
    _bucket: Bucket | None = None

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Map the bucket; one that was mapped before is let go.

        Raises:
            ValueError: it is not there, or not a bucket.

        """
        self._bucket = Bucket(init_info.segment)

    def start_weight_update(self) -> None:
        """Open a sync of weights in checkpoint format."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(
        self,
        update_info: SharedMemoryUpdateInfo,
        load_weights: LoadWeights | None = None,
    ) -> None:
        """Load a chunk.

        Args:
            update_info: where it lies.
            load_weights: what to load it with; by default the model does. Before 0.32
                the worker says.

        Raises:
            ValueError: the bucket is not the one that was mapped, or the chunk cannot
                lie in it as described.
            WeightSyncError: the model cannot load it.

        """
        memory = self._memory_of(update_info.segment)
        chunk = placements(
            update_info.names,
            update_info.dtype_names,
            update_info.shapes,
            update_info.offsets,
            memory.numel(),
        )
        model: Any = self.model
        load = load_weights or model.load_weights
        with load_in_parts():
            load([(each.name, each.view(memory)) for each in chunk])

    def finish_weight_update(self) -> None:
        """Commit the sync."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Let the bucket go."""
        self._bucket = None

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Not here: a trainer needs nothing of vLLM to send weights this way."""
        raise NotImplementedError("see examples/rl/shm_trainer.py")

    def _memory_of(self, segment: str) -> torch.Tensor:
        """Return the memory of the mapped bucket, uint8 [bytes]."""
        mapped = self._bucket and self._bucket.segment
        if self._bucket is None or segment != mapped:
            raise ValueError(
                f"update_info: expected segment {mapped!r}, which "
                f"init_weight_transfer_engine named, got {segment!r:.200}"
            )
        return self._bucket.memory()
