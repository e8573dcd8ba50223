# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Host memory in the place of a GPU's, shared between processes that are one.

with shared_memory_of_a_gpu() as gpu:
    send_by_ipc(tensors, ask)
    gpu.spoil()     # all that was shared is poison now

CUDA IPC shares memory by handles. Here a handle is a number, and who opens it gets the
very tensor, so that vLLM's backend runs as it is, both sides of it.
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

__all__ = ["SharedMemoryOfGpu", "shared_memory_of_a_gpu"]

DEVICE_PLACE = 6  # of the device among the arguments that a handle consists of
# NaN in every floating-point format.
POISON = 0xFF


@dataclass
class SharedMemoryOfGpu:
    """What was shared, by handle."""

    shared: list[torch.Tensor] = field(default_factory=list)

    def export(self, tensor: torch.Tensor) -> tuple[None, tuple]:
        """Stand in for `reduce_tensor`."""
        self.shared.append(tensor)
        return None, (len(self.shared) - 1, *[None] * DEVICE_PLACE)

    def open(self, handle: int, *_: Any) -> torch.Tensor:
        """Stand in for `rebuild_cuda_tensor`."""
        return self.shared[handle]

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
    uuid = SimpleNamespace(uuid="the one of this test")
    stream = SimpleNamespace(synchronize=lambda: None)
    with pytest.MonkeyPatch.context() as patch, _OnHost():
        for module in (ipc_engine, packed_tensor):
            patch.setattr(module, "reduce_tensor", gpu.export)
        for module in (ipc_engine, reductions):
            patch.setattr(module, "rebuild_cuda_tensor", gpu.open)
        patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        patch.setattr(torch.cuda, "get_device_properties", lambda index: uuid)
        patch.setattr(torch.cuda, "current_stream", lambda: stream)
        patch.setattr(torch.cuda, "ipc_collect", lambda: None)
        yield gpu
