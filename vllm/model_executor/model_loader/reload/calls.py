# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How weight loaders were called, and with which of a checkpoint's tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any

import torch

from .tensor_guards import guards_of
from .view import View

__all__ = ["CallNotes", "LoaderCall", "Sent", "TensorSpec", "WatchedWeights"]

_PARAM, _WEIGHT = "<param>", "<weight>"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor that a loader was given."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorSpec":
        return cls(tuple(tensor.shape), tensor.dtype)

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True)
class LoaderCall:
    """Arguments of a weight loader with its tensors left out.

    By the convention of weight loaders the first tensor is the parameter and the
    second one the loaded weight.

    Attributes:
        values: positional arguments, and then named ones.
        names: of the latter.

    """

    values: tuple[Any, ...]
    names: tuple[str, ...]

    @classmethod
    def split(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple["LoaderCall", torch.Tensor | None]:
        """The call without its tensors, and the weight that it was to load."""
        values = [*args, *kwargs.values()]
        weight = _without_tensors(values, _tensors(values))
        return cls(tuple(values), tuple(kwargs)), weight

    @property
    def named(self) -> dict[str, Any]:
        """Named arguments."""
        return _arguments(self.values, self.names)[1]

    def replay(
        self, loader: Callable, param: torch.Tensor, weight: torch.Tensor
    ) -> None:
        """Call `loader` as it was called, with these two tensors."""
        tensors = {_PARAM: param, _WEIGHT: weight}
        values = [tensors.get(v, v) if isinstance(v, str) else v for v in self.values]
        args, kwargs = _arguments(values, self.names)
        loader(*args, **kwargs)


def _arguments(
    values: Sequence[Any], names: Sequence[str]
) -> tuple[Sequence[Any], dict[str, Any]]:
    """Positional and named arguments."""
    count = len(values) - len(names)
    return values[:count], dict(zip(names, values[count:]))


def _tensors(values: Sequence[Any]) -> list[int]:
    """Places of the tensors among arguments."""
    return [i for i, value in enumerate(values) if isinstance(value, torch.Tensor)]


def _without_tensors(values: list[Any], tensors: list[int]) -> torch.Tensor | None:
    """Take the tensors out of a loader's arguments; return the weight to be loaded."""
    param = weight = None
    for i in tensors:
        value = values[i]
        if param is None or value is param:
            param, values[i] = value, _PARAM
        else:
            weight, values[i] = value if weight is None else weight, _WEIGHT
    return weight


@dataclass(frozen=True, slots=True)
class Sent:
    """A checkpoint's tensor, which need not exist any more.

    Attributes:
        name: its name in the checkpoint.
        spec: its shape and type.
        number: its place among all that were sent, also under the same name.

    """

    name: str
    spec: TensorSpec
    number: int


@dataclass(frozen=True, slots=True)
class _Kind:
    """What many calls have in common.

    Attributes:
        count: how many arguments they were given.
        names: of the last of these.
        spec: of the weight.
        stride: of the weight.
        sent: of what the weight is a part of.
        is_contiguous: whether that is.

    """

    count: int
    names: tuple[str, ...]
    spec: TensorSpec
    stride: tuple[int, ...]
    sent: TensorSpec
    is_contiguous: bool

    def view(self, begin: int) -> View | None:
        """The view that begins so many bytes inside what was sent, if it is one."""
        if not self.is_contiguous:
            return None
        offset, rest = divmod(begin, self.spec.dtype.itemsize)
        last = offset + sum((n - 1) * s for n, s in zip(self.spec.shape, self.stride))
        is_inside = 0 <= offset <= last < prod(self.sent.shape)
        if rest or not is_inside or self.spec.dtype != self.sent.dtype:
            return None
        return View(self.spec.shape, self.stride, offset)


class WatchedWeights:
    """Which of a checkpoint's tensors is being loaded.

        for name, tensor in weights.watch(checkpoint):
            ...     # weights.current is (name, tensor)

    Attributes:
        current: name and tensor; None between two of them.
        number: how many came until now.
        version: of the tensor as it came; see `_version`.

    """

    def __init__(self) -> None:
        self.current: tuple[str, torch.Tensor] | None = None
        self.number = 0
        self.version: int | None = None

    def watch(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass weights on."""
        try:
            for self.current in weights:
                self.number += 1
                self.version = _version(self.current[1])
                yield self.current
                self.current = None
        finally:
            self.current = None


class CallNotes:
    """Calls of one loader, noted as quickly as can be and looked at later.

    A cold load makes tens of thousands of them. Each is noted as plain values in one
    list: an object would be visited by the garbage collector, again and again. What a
    call has in common with the one before is kept once, and to ask of each argument
    whether it is a tensor takes longer than to see that the types are the same.
    """

    def __init__(self) -> None:
        self._noted: list[Any] = []
        # Types of the arguments of the call before, and names of those that have one.
        self._form: list[type | str] = []
        self._tensors: list[int] = []
        self._kind: _Kind | None = None
        # Whether a weight, and what it is a part of if it is not all, are of that kind.
        self._guards = guards_of()
        self._guarded = 0

    def __bool__(self) -> bool:
        return bool(self._noted)

    def add(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], weights: WatchedWeights
    ) -> None:
        """Note a call, if it was given a weight.

        Args:
            args: the loader's positional arguments.
            kwargs: its named ones.
            weights: tell what the weight is a view of.

        """
        values = [*args, *kwargs.values()]
        form: list[type | str] = [*map(type, values), *kwargs]
        if form != self._form:
            self._form, self._tensors, self._guarded = form, _tensors(values), 0
        weight = _without_tensors(values, self._tensors)
        if weight is None:
            return
        name, sent = weights.current or (None, weight)
        if _version(weight) != weights.version:
            name, sent = None, weight  # changed on the way: no view of what came
        begin = 0 if sent is weight else weight.data_ptr() - sent.data_ptr()
        tensors = (weight,) if sent is weight else (weight, sent)
        if len(tensors) != self._guarded or not self._guards.check(*tensors):
            self._guards, self._guarded = guards_of(*tensors), len(tensors)
            self._kind = _kind_of(weight, sent, len(values), tuple(kwargs))
        self._noted += (self._kind, name, weights.number, begin, *values)

    def __iter__(
        self,
    ) -> Iterator[tuple[LoaderCall, TensorSpec, Sent | None, View | None]]:
        """Each call, what it was given, and which view of what that was."""
        noted = iter(self._noted)
        for kind in noted:
            name, number, begin, *values = islice(noted, 3 + kind.count)
            call = LoaderCall(tuple(values), kind.names)
            if name is None:
                yield call, kind.spec, None, None
            else:
                sent = Sent(name, kind.sent, number)
                yield call, kind.spec, sent, kind.view(begin)


def _version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written in place, its views included, if that is known."""
    return None if tensor.is_inference() else tensor._version


def _kind_of(
    weight: torch.Tensor, sent: torch.Tensor, count: int, names: tuple[str, ...]
) -> _Kind:
    spec, stride = TensorSpec.of(weight), weight.stride()
    is_contiguous = sent.is_contiguous()
    return _Kind(count, names, spec, stride, TensorSpec.of(sent), is_contiguous)
