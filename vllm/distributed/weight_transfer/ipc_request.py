# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Chunks through vLLM's CUDA IPC backend, checked before a handle of them is opened.

    unpacked    each tensor has a handle of its own, by the GPU that it lies on
    packed      all lie one after the other in a buffer, which has one

vLLM reads what a trainer says of them as it comes. What cannot be is an error of many
kinds then, or a tensor that is left out. Here it is a `ValueError` that names it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate
from typing import Any

import torch

from vllm.distributed.weight_transfer.ipc_handle import DTYPE, SIZE, flaw_of
from vllm.distributed.weight_transfer.update_entry import (
    Entry,
    check_lists,
    is_size,
    short,
)

__all__ = ["MAX_TENSORS", "checks_chunks"]

Parse = Callable[[Any, Any], Any]
Receive = Callable[..., None]

# An unpacked model comes in one request: 256 experts in 60 layers are 90,000 tensors.
MAX_TENSORS = 1 << 20
LISTS = ("names", "dtype_names", "shapes")


def checks_chunks(engine: Any) -> Any:
    """Make `IPCWeightTransferEngine` check what it parses, and then receives.

    It parses without a GPU.
    """
    engine.parse_update_info = _checks_lists(engine.parse_update_info)
    engine.receive_weights = _checks_tensors(engine.receive_weights)
    return engine


def _checks_lists(parse: Parse) -> Parse:
    @wraps(parse)
    def checked(engine: Any, update_dict: Any) -> Any:
        if not isinstance(update_dict, dict):
            raise ValueError(
                f"update_info: expected an object, got {short(update_dict)}"
            )
        check_lists({key: update_dict.get(key) for key in LISTS}, MAX_TENSORS)
        return _parsed(parse, engine, update_dict)

    return checked


def _checks_tensors(receive: Receive) -> Receive:
    @wraps(receive)
    def checked(engine: Any, update_info: Any, *args: Any, **kwargs: Any) -> None:
        # Before 0.32 each chunk says it, then the trainer once for all.
        if getattr(update_info, "packed", None) or getattr(engine, "packed", False):
            _check_packed(update_info, _gpu_of(engine))
        else:
            _check_unpacked(update_info, _gpu_of(engine))
        return receive(engine, update_info, *args, **kwargs)

    return checked


def _parsed(parse: Parse, engine: Any, update_dict: dict[str, Any]) -> Any:
    """Parse; whatever fails when handles are unpickled is an error of the request."""
    try:
        return parse(engine, update_dict)
    except Exception as error:
        raise ValueError(
            f"update_info cannot be read: {type(error).__name__}: {error!s:.200}; send "
            "handles of torch's reduce_tensor, as 'ipc_handles' or, pickled and in "
            "base64, as 'ipc_handles_pickled'"
        ) from error


def _gpu_of(engine: Any) -> Callable[[], str]:
    """Return what tells the GPU of this rank, by the name that handles go by."""

    def gpu() -> str:
        if hasattr(engine, "device"):
            index = engine.device.index
        else:  # before 0.32
            index = torch.accelerator.current_device_index()
        return str(torch.cuda.get_device_properties(index).uuid)

    return gpu


def _check_unpacked(info: Any, gpu: Callable[[], str]) -> None:
    check_lists({"names": info.names, "ipc_handles": info.ipc_handles}, MAX_TENSORS)
    # vLLM takes nothing but a list for unpacked handles.
    handles = info.ipc_handles = list(info.ipc_handles)
    lists = (info.names, info.dtype_names, info.shapes, handles)
    entries = [UnpackedEntry(i, *values) for i, values in enumerate(zip(*lists))]
    for entry in entries:
        entry.check_parts()
    own = gpu() if entries else ""
    for entry in entries:
        entry.check_handle(own)


def _check_packed(info: Any, gpu: Callable[[], str]) -> None:
    sizes = info.tensor_sizes
    check_lists({"names": info.names, "tensor_sizes": sizes}, MAX_TENSORS)
    lists = (info.names, info.dtype_names, info.shapes, sizes)
    entries = [PackedEntry(i, *values) for i, values in enumerate(zip(*lists))]
    for entry in entries:
        entry.check_parts()
    _check_is_by_gpu(info.ipc_handles)
    room = _buffer_bytes(info.ipc_handles, gpu())
    for entry, start in zip(entries, accumulate(sizes, initial=0)):
        entry.check_place(start, room)


@dataclass(frozen=True)
class IpcEntry(Entry):
    """What a trainer says of one tensor; of any type."""

    def check_parts(self) -> None:
        """Check what can be checked without a GPU.

        Raises:
            ValueError: something is wrong.

        """
        self.check_name()
        if self.dtype is None:
            self._refuse("dtype", "one of torch's, such as bfloat16", self.dtype_name)
        self.check_shape()

    @property
    def dtype(self) -> torch.dtype | None:
        """The tensor's type; None if torch has none of that name."""
        known = isinstance(self.dtype_name, str)
        dtype = getattr(torch, self.dtype_name, None) if known else None
        return dtype if isinstance(dtype, torch.dtype) else None


@dataclass(frozen=True)
class UnpackedEntry(IpcEntry):
    """What a trainer says of one tensor that has a handle; of any type."""

    handles: Any

    def check_parts(self) -> None:
        """Check what can be checked without a GPU.

        Raises:
            ValueError: something is wrong.

        """
        super().check_parts()
        if not isinstance(self.handles, dict):
            self._refuse("handle", "an object with one for each GPU", self.handles)

    def check_handle(self, gpu: str) -> None:
        """Check the handle for a GPU, if there is one; vLLM says so if there is none.

        Raises:
            ValueError: it is none, or not that of such a tensor.

        """
        if gpu not in self.handles:
            return
        handle = self.handles[gpu]
        if (flaw := flaw_of(handle)) is not None:
            self._refuse("handle", *flaw)
        if handle[DTYPE] != self.dtype:
            self._refuse("dtype", f"{handle[DTYPE]}, as its handle", self.dtype_name)
        if list(handle[SIZE]) != list(self.shape):
            expected = f"{list(handle[SIZE])}, as its handle"
            self._refuse("shape", expected, self.shape)


@dataclass(frozen=True)
class PackedEntry(IpcEntry):
    """What a trainer says of one tensor in a buffer; of any type."""

    size: Any

    def check_parts(self) -> None:
        """Check what can be checked without a GPU.

        Raises:
            ValueError: something is wrong.

        """
        super().check_parts()
        dtype = self.dtype
        assert dtype is not None
        nbytes = math.prod(self.shape) * dtype.itemsize
        if not is_size(self.size) or self.size != nbytes:
            self._refuse("size", f"{nbytes} bytes, by dtype and shape", self.size)

    def check_place(self, start: int, room: int) -> None:
        """Check where the tensor lies.

        Args:
            start: its first byte.
            room: bytes in the buffer.

        Raises:
            ValueError: it ends outside, or no tensor of its dtype can begin there.

        """
        dtype = self.dtype
        assert dtype is not None  # see `check_parts`
        if start % dtype.itemsize:
            expected = f"a multiple of {dtype.itemsize}, for a view of the buffer"
            self._refuse("place", expected, f"byte {start}")
        if start + self.size > room:
            place = f"bytes {start} to {start + self.size}"
            self._refuse("place", f"in a buffer of {room} bytes", place)


def _check_is_by_gpu(handles: Any) -> None:
    if not isinstance(handles, dict):
        raise ValueError(
            "update_info: expected an object with a handle of the buffer for each GPU "
            f"as 'ipc_handles', got {short(handles)}"
        )


def _buffer_bytes(handles: dict[Any, Any], gpu: str) -> int:
    """Return how large the buffer for a GPU is, in bytes.

    Raises:
        ValueError: there is none, or it is no buffer.

    """
    if gpu not in handles:
        raise ValueError(
            f"update_info: expected a handle for GPU {gpu}, got those for "
            f"{short(list(handles))}"
        )
    flaw = flaw_of(handles[gpu])
    if flaw is None:
        size, kind = handles[gpu][SIZE], handles[gpu][DTYPE]
        if kind == torch.uint8 and len(size) == 1:
            return size[0]
        expected, got = "uint8 in one dimension", f"{kind} of shape {list(size)}"
    else:
        expected, got = flaw
    raise ValueError(
        f"update_info: expected a handle of the buffer: {expected}, got {short(got)}"
    )
