# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Handles of a GPU's memory, as torch's `reduce_tensor` gives them to a trainer.

    _, handle = reduce_tensor(tensor)       # trainer
    flaw = flaw_of(handle)                  # engine
    tensor = rebuild_cuda_tensor(*handle)

torch reads a handle without looking. A counter beyond the end of its file ends the
process, and a tensor without memory gets memory that nobody wrote. So each field is
looked at first. What CUDA itself refuses is seen when a handle is opened. How large the
memory is, a handle alone knows.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch.multiprocessing import reductions

from vllm.distributed.weight_transfer.update_entry import is_size, short

__all__ = ["DTYPE", "FIELDS", "SIZE", "Flaw", "flaw_of", "rebuild_cuda_tensor"]

FIELDS = tuple(signature(reductions.rebuild_cuda_tensor).parameters)
SIZE, STRIDE = FIELDS.index("tensor_size"), FIELDS.index("tensor_stride")
DTYPE, HANDLE = FIELDS.index("dtype"), FIELDS.index("storage_handle")
# torch keeps the counters of a process's handles in files of this many.
COUNTERS = 10_000
EVENT_BYTES = 64
STORAGES = (torch.storage.TypedStorage, torch.UntypedStorage)


class Flaw(NamedTuple):
    """What keeps a handle from being opened.

    Attributes:
        expected: what should be there.
        got: what is there.

    """

    expected: str
    got: Any


def flaw_of(handle: Any) -> Flaw | None:
    """Return what keeps a handle from being opened; None if nothing is known to.

    Args:
        handle: what a trainer sent as one; of any type.

    """
    if not isinstance(handle, tuple | list) or len(handle) != len(FIELDS):
        fields = f"the {len(FIELDS)} fields that torch's reduce_tensor gives"
        return Flaw(fields, handle)
    is_empty = handle[HANDLE] is None
    for place, is_right, expected in _OF_EMPTY if is_empty else _OF_MEMORY:
        if not is_right(handle[place]):
            return Flaw(f"{expected} as {FIELDS[place]}", handle[place])
    size, stride = handle[SIZE], handle[STRIDE]
    if len(size) != len(stride):
        return Flaw(f"as many strides as the sizes {short(size)}", stride)
    if is_empty and 0 not in size:
        return Flaw(f"memory for a tensor of shape {short(list(size))}", None)
    return None


def rebuild_cuda_tensor(*handle: Any) -> torch.Tensor:
    """Open a handle without a flaw.

    Returns:
        The trainer's tensor itself, not a copy.

    Raises:
        ValueError: torch or CUDA refuse it: what it names is not there, not shared, or
            too small for the tensor.
        OutOfMemoryError: there is no memory to map it.

    """
    try:
        return reductions.rebuild_cuda_tensor(*handle)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(
            f"update_info: the handle of a {handle[DTYPE]} tensor of shape "
            f"{list(handle[SIZE])} cannot be opened: {error}; send handles of "
            "memory that the trainer keeps until the request is answered"
        ) from error


def _is_class(*bases: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, type) and issubclass(value, bases)


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(map(is_size, value))


def _is_event(value: Any) -> bool:
    return isinstance(value, bytes) and len(value) == EVENT_BYTES


def _is_filled(value: Any) -> bool:
    return isinstance(value, bytes) and len(value) > 0


def _is_positive(value: Any) -> bool:
    return is_size(value) and value > 0


def _is_counter(value: Any) -> bool:
    return is_size(value) and value < COUNTERS


Check = tuple[int, Callable[[Any], bool], str]


def _checks(**fields: tuple[Callable[[Any], bool], str]) -> tuple[Check, ...]:
    """Return places of fields, what checks them, and what is expected there."""
    return tuple((FIELDS.index(name), *check) for name, check in fields.items())


# Of a tensor without elements, which has no memory.
_OF_EMPTY = _checks(
    tensor_cls=(_is_class(torch.Tensor), "a class of tensors"),
    tensor_size=(_is_sizes, "sizes"),
    tensor_stride=(_is_sizes, "sizes"),
    tensor_offset=(is_size, "a count"),
    storage_cls=(_is_class(*STORAGES), "a class of storages"),
    dtype=(_is_a(torch.dtype), "a dtype of torch's"),
    requires_grad=(_is_a(bool), "true or false"),
)
_OF_MEMORY = _OF_EMPTY + _checks(
    storage_handle=(_is_filled, "bytes"),
    storage_size_bytes=(_is_positive, "a count of bytes"),
    storage_offset_bytes=(is_size, "a count of bytes"),
    ref_counter_handle=(_is_filled, "bytes"),
    ref_counter_offset=(_is_counter, f"a count below {COUNTERS}"),
    event_handle=(_is_event, f"{EVENT_BYTES} bytes"),
    event_sync_required=(_is_a(bool), "true or false"),
)
