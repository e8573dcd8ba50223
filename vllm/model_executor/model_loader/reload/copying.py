# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Carrying out what a plan says: one copy at a time, or many at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ctypes import memmove
from functools import partial

import numpy as np
import torch

from vllm.model_executor.kernels.strided import Batch, Strided
from vllm.triton_utils import HAS_TRITON

from .ledger import Box
from .route import PLAIN_DISPATCH, Copy

__all__ = ["Copies", "batch_launcher", "copy_together", "copy_values"]

Launch = Callable[[Sequence[Batch]], None]
# A target and a source.
_Pair = tuple[torch.Tensor, torch.Tensor]
# Names of a layer and of its tensor.
_Key = tuple[str, str]
_Write = tuple[Box, Strided]

# Of longer runs torch has its threads copy a share each.
_BYTES_OF_ONE_THREAD = 1 << 15


def batch_launcher(device: torch.device) -> Launch | None:
    """What launches many copies on a device; None where nothing does."""
    if device.type == "cpu" or not HAS_TRITON:
        return None
    from vllm.model_executor.kernels.strided_copy import copy_strided

    return partial(copy_strided, device=device)


class Copies:
    """Copies from a caller's tensors to staged memory.

        copies.add(copy, tensor, memory)    # may be put off
        copies.flush()                      # before anybody reads the memory, or
                                            # changes a tensor

    A tensor that is on another device, or is cast on the way, is copied at once. So is
    all on a CPU, short runs without torch, which takes longer to prepare such a copy
    than to make it.

    Args:
        launch: carries out many copies at once; see `batch_launcher`.

    Attributes:
        put_off: whether copies may wait for `flush`.

    """

    def __init__(self, launch: Launch | None = None) -> None:
        self.put_off = False
        self._launch = launch
        self._waiting: defaultdict[Strided, dict[int, int]] = defaultdict(dict)
        self._runs: list[Batch] = []
        # What waits to be written: where in each tensor, if one by one, by expert.
        self._boxes: defaultdict[_Key, dict[int, set[_Write]]] = defaultdict(dict)

    @property
    def can_wait(self) -> bool:
        """Whether copies within a device are put off."""
        return self.put_off and self._launch is not None

    def add(self, copy: Copy, tensor: torch.Tensor, memory: torch.Tensor) -> None:
        """Copy a part of `tensor` to a part of `memory`."""
        layout = copy.layout
        target = memory.data_ptr() + copy.target_bytes
        source = tensor.data_ptr() + copy.source_bytes
        on_device = tensor.get_device() == memory.get_device()
        if self.can_wait and layout and on_device:
            self._keep_in_order(copy, layout)
            self._waiting[layout][target] = source
            return
        # Of a repeated target the last source counts.
        if copy.tensor in self._boxes:
            self.flush()
        if layout and _is_short(layout) and tensor.is_cpu and memory.is_cpu:
            memmove(target, source, layout.row_bytes)
        else:
            part = tensor if copy.source is None else copy.source.on(tensor)
            copy_values(copy.target.on(memory.data), part)

    def _keep_in_order(self, copy: Copy, layout: Strided) -> None:
        """Carry out what waits and shares a part of its target with `copy`.

        A launch copies all at once. Tensors under other names may share parts, such as
        gate and up with one that fuses them; the same ones take each other's place.
        """
        writes = [(box, layout) for box in copy.boxes]
        waiting = self._boxes[copy.tensor]
        if any(
            write != other and write[0].meets(other[0])
            for write in writes
            for other in _near(waiting, write[0])
        ):
            self.flush()
            waiting = self._boxes[copy.tensor]
        for write in writes:
            waiting.setdefault(_lane(write[0]), set()).add(write)

    def add_run(
        self, key: _Key, layout: Strided, targets: np.ndarray, sources: np.ndarray
    ) -> None:
        """Put off copies to what nothing was copied to, from and to these addresses."""
        self._runs.append((layout, targets, sources))
        _ = self._boxes[key]  # what comes one by one is carried out after it

    def flush(self) -> None:
        """Carry out what was put off."""
        runs, self._runs = self._runs, []
        waiting, self._waiting = self._waiting, defaultdict(dict)
        self._boxes.clear()
        # What came one by one may have come again, and the last counts.
        ones = [_batch(layout, sources) for layout, sources in waiting.items()]
        # A default device, say, is a mode of its own, and costs more than a launch.
        with torch._C.DisableTorchFunction():
            for batches in filter(None, (runs, ones)):
                assert self._launch is not None
                self._launch(batches)


def copy_together(pairs: Iterable[_Pair]) -> None:
    """Copy tensors to others of their shapes, in any order, by one launch a device.

    Args:
        pairs: targets and sources; what a source reads, no target shares.

    """
    runs: defaultdict[torch.device, list[_Pair]] = defaultdict(list)
    for target, source in pairs:
        if _is_one_run(target, source):
            runs[target.device].append((target, source))
        else:
            copy_values(target.data, source.data)
    for device, dense in runs.items():
        launch = batch_launcher(device)
        if launch is not None:
            launch(_batches_of(dense))
            continue
        for target, source in dense:
            copy_values(target.data, source.data)


def _is_one_run(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether copying the one to the other is copying bytes that follow each other."""
    return (
        target.is_contiguous()
        and source.is_contiguous()
        and target.shape == source.shape
        and target.dtype is source.dtype
        and target.get_device() == source.get_device()
        and type(target).__torch_dispatch__ is PLAIN_DISPATCH
    )


def _batches_of(pairs: Iterable[_Pair]) -> list[Batch]:
    # Tied weights have one target, and a launch copies all at once.
    by_bytes: defaultdict[int, dict[int, int]] = defaultdict(dict)
    for target, source in pairs:
        by_bytes[target.nbytes][target.data_ptr()] = source.data_ptr()
    return [
        _batch(Strided(1, 1, n, 0, 0, 0, 0), sources) for n, sources in by_bytes.items()
    ]


def _batch(layout: Strided, sources: Mapping[int, int]) -> Batch:
    """Copies from each address to that by which it is found."""
    return layout, np.array([*sources]), np.array([*sources.values()])


def copy_values(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a tensor to another of its shape.

    Torch's processors copy FP8 one value at a time, and bytes as many as fit.
    """
    if target.dtype == source.dtype and target.dtype.itemsize == 1:
        target, source = target.view(torch.uint8), source.view(torch.uint8)
    target.copy_(source)


def _lane(box: Box) -> int:
    """The one expert that a box is in; -1 if there are none, or it is in several."""
    start, stop = box.start, box.stop
    return start[0] if len(start) > 2 and stop[0] == start[0] + 1 else -1


def _near(waiting: Mapping[int, set[_Write]], box: Box) -> Iterator[_Write]:
    """Those writes that may share a part with a box."""
    lane = _lane(box)
    lanes = waiting if lane < 0 else (lane, -1)
    return (write for each in lanes for write in waiting.get(each, ()))


def _is_short(layout: Strided) -> bool:
    """Whether it is one run that torch would copy on one thread."""
    return layout.outer == layout.rows == 1 and layout.row_bytes <= _BYTES_OF_ONE_THREAD
