# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the first load wrote, which is what every later sync owes.

A checkpoint seldom fills a parameter by name alone: loaders shard, pad, and skip the
experts of other ranks. So the first load notes how each loader was called, which costs
less than a microsecond, and the regions are derived from those calls when a sync first
asks for them, by calling the loaders again on the meta device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .ledger import Box, boxes_of_view

__all__ = ["FirstLoad", "LoaderCall", "RecordingLoader", "TensorSpec", "wrote"]

_PARAM, _WEIGHT = "<param>", "<weight>"


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that a loader was given."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorSpec":
        return cls(tuple(tensor.shape), tensor.dtype)

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class LoaderCall:
    """Arguments of a weight loader with its tensors left out.

    By the convention of weight loaders the first tensor is the parameter and the
    second one the loaded weight.
    """

    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @classmethod
    def split(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple["LoaderCall", torch.Tensor | None]:
        """The call without its tensors, and the weight that it was to load."""
        rest = (*args[2:], *kwargs.values())
        usual = len(args) > 1 and all(map(_is_tensor, args[:2]))
        if usual and not any(map(_is_tensor, rest)):  # in a few microseconds
            call = cls((_PARAM, _WEIGHT, *args[2:]), tuple(kwargs.items()))
            return call, args[1]
        return cls._split_rare(args, kwargs)

    @classmethod
    def _split_rare(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple["LoaderCall", torch.Tensor | None]:
        tensors: list[torch.Tensor] = []

        def leave_out(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            tensors.append(value)
            return _PARAM if len(tensors) == 1 else _WEIGHT

        call = cls(
            tuple(leave_out(value) for value in args),
            tuple((name, leave_out(value)) for name, value in kwargs.items()),
        )
        return call, tensors[1] if len(tensors) > 1 else None

    def replay(
        self, loader: Callable, param: torch.Tensor, weight: torch.Tensor
    ) -> None:
        """Call `loader` as it was called, with these two tensors."""
        tensors = {_PARAM: param, _WEIGHT: weight}

        def put_back(value: Any) -> Any:
            return tensors.get(value, value) if isinstance(value, str) else value

        loader(
            *(put_back(value) for value in self.args),
            **{name: put_back(value) for name, value in self.kwargs},
        )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


@dataclass
class FirstLoad:
    """How the loader of one parameter was called by the first load.

    Attributes:
        calls: what each distinct call was given to load.
        ambiguous: whether calls that look alike were given different shapes.
        bypassed: whether the parameter was written past its loader.
        boxes_written: the regions, once derived or learnt from a complete sync.

    """

    calls: dict[LoaderCall, TensorSpec] = field(default_factory=dict)
    ambiguous: bool = False
    bypassed: bool = False
    boxes_written: list[Box] | None = None

    @property
    def seen(self) -> bool:
        """Whether anything was loaded."""
        return bool(self.calls) or self.ambiguous or self.bypassed

    def note(self, call: LoaderCall, weight: torch.Tensor) -> None:
        spec = TensorSpec.of(weight)
        try:
            self.ambiguous |= self.calls.setdefault(call, spec) != spec
        except TypeError:  # an argument that cannot be told from others by its hash
            self.ambiguous = True

    def expected(self, call: LoaderCall) -> TensorSpec | None:
        """What this call was given by the first load, if it was made then."""
        return None if self.ambiguous else self.calls.get(call)

    def boxes(self, loader: Callable, param: torch.Tensor) -> list[Box] | None:
        """Regions of `param` (on meta) that the calls write, or None if unknown.

        Unknown are loaders that look at values, which a meta tensor does not have.
        """
        recorder = _MetaWrites(param)
        if self.ambiguous:
            return None
        try:
            with recorder:
                for call, spec in self.calls.items():
                    weight = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
                    call.replay(loader, param, weight)
        except Exception:
            return None
        return recorder.boxes


class RecordingLoader:
    """A weight loader that notes its calls on the way to the original."""

    def __init__(self, original: Callable, first_load: FirstLoad, version: int):
        update_wrapper(self, original)
        self.original = original
        self._first_load = first_load
        self._version = version

    def __call__(self, *args, **kwargs):
        call, weight = LoaderCall.split(args, kwargs)
        if weight is not None:
            self._first_load.note(call, weight)
        return self.original(*args, **kwargs)

    def close(self, version: int) -> None:
        """Note a parameter of another version that no call accounts for."""
        first_load = self._first_load
        first_load.bypassed = version != self._version and not first_load.seen


def wrote(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator call fills its first argument with loaded values.

    Filling many elements with one value is preparation, not loading; one element is
    how some loaders store a scalar.
    """
    if func is torch.ops.aten.copy_.default:
        return True
    fills = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor)
    return func in fills and args[0].numel() == 1


class _MetaWrites(TorchDispatchMode):
    """Collects the boxes of one meta tensor that are written under this mode."""

    def __init__(self, param: torch.Tensor):
        super().__init__()
        self.boxes: list[Box] = []
        self._param = param
        self._storage = param.untyped_storage()._cdata

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if wrote(func, args) and args[0].untyped_storage()._cdata == self._storage:
            self.boxes += boxes_of_view(args[0], self._param)
        return func(*args, **(kwargs or {}))
