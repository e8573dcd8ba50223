# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Host memory in the place of a GPU's, shared between processes that are one.

with shared_memory_of_a_gpu() as gpu:
    send_by_ipc(tensors, ask)
    gpu.spoil()     # all that was shared is poison now

CUDA IPC shares memory by handles. Here a handle has what torch puts into one, but a
number in the place of CUDA's own part, and who opens it gets the very tensor, so that
vLLM's backend runs as it is, both sides of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions
from torch.overrides import TorchFunctionMode

from vllm.distributed.weight_transfer import ipc_engine, packed_tensor

__all__ = ["GPU", "SharedMemoryOfGpu", "shared_memory_of_a_gpu"]

EVENT_BYTES = 64
HANDLE_PLACE = 7  # of CUDA's part among the arguments that a handle consists of
GPU = "the one of this test"
# NaN in every floating-point format.
POISON = 0xFF


@dataclass
class SharedMemoryOfGpu:
    """What was shared, by handle."""

    shared: list[torch.Tensor] = field(default_factory=list)

    def export(self, tensor: torch.Tensor) -> tuple[None, tuple]:
        """Stand in for `reduce_tensor`."""
        self.shared.append(tensor)
        number = str(len(self.shared) - 1).encode()
        device, requires_grad, offset, must_wait = 0, False, 0, False
        return None, (
            *(type(tensor), tensor.size(), tensor.stride(), tensor.storage_offset()),
            *(torch.storage.TypedStorage, tensor.dtype, device),
            *(number, tensor.untyped_storage().nbytes(), offset, requires_grad),
            *(b"counter", offset, bytes(EVENT_BYTES), must_wait),
        )

    def open(self, *handle: Any) -> torch.Tensor:
        """Stand in for `rebuild_cuda_tensor`.

        Raises:
            RuntimeError: as CUDA says that nobody shared this.
        """
        number = handle[HANDLE_PLACE]
        if not number.isdigit() or int(number) >= len(self.shared):
            raise RuntimeError("CUDA error: invalid argument")
        return self.shared[int(number)]

    def spoil(self) -> None:
        """Write over all of it, as its owner may once a request is answered."""
        for tensor in self.shared:
            tensor.reshape(-1).view(torch.uint8).fill_(POISON)


class _OnHost(TorchFunctionMode):
    """Makes on the host what is to be made on a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def shared_memory_of_a_gpu() -> Iterator[SharedMemoryOfGpu]:
    """Let vLLM's IPC backend run without a GPU."""
    gpu = SharedMemoryOfGpu()
    uuid = SimpleNamespace(uuid=GPU)
    stream = SimpleNamespace(synchronize=lambda: None)
    with pytest.MonkeyPatch.context() as patch, _OnHost():
        for module in (ipc_engine, packed_tensor):
            patch.setattr(module, "reduce_tensor", gpu.export)
        patch.setattr(reductions, "rebuild_cuda_tensor", gpu.open)
        patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        patch.setattr(torch.accelerator, "current_stream", lambda: stream)
        patch.setattr(torch.accelerator, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "get_device_properties", lambda index: uuid)
        patch.setattr(torch.cuda, "current_stream", lambda: stream)
        patch.setattr(torch.cuda, "ipc_collect", lambda: None)
        yield gpu
