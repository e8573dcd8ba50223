# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How weight loaders were called, and with which of a checkpoint's tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any

import torch

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


@dataclass(frozen=True)
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


# Shape, stride and type.
_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
# At which byte of a tensor a weight begins, and that tensor's shape and type, and
# whether it is contiguous.
_Place = tuple[int, tuple[int, ...], torch.dtype, bool]
# What many calls have in common: types of all arguments and names of those that have
# one; the weight's layout; and, if it is known, which part it is of what was sent.
_Kind = tuple[list[type | str], _Layout, _Place | None]


class WatchedWeights:
    """Which of a checkpoint's tensors is being loaded.

        for name, tensor in weights.watch(checkpoint):
            ...     # weights.current is (name, tensor)

    Attributes:
        current: name and tensor; None between two of them.
        number: how many came until now.

    """

    def __init__(self) -> None:
        self.current: tuple[str, torch.Tensor] | None = None
        self.number = 0

    def watch(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass weights on."""
        try:
            for self.current in weights:
                self.number += 1
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
        self._kind: _Kind | None = None
        # Of the weight of that kind, if it is all of what was sent.
        self._whole: _Layout | None = None
        self._form: list[type | str] = []
        self._tensors: list[int] = []

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
            self._form, self._tensors, self._whole = form, _tensors(values), None
        weight = _without_tensors(values, self._tensors)
        if weight is None:
            return
        name, tensor = weights.current or (None, None)
        layout = weight.shape, weight.stride(), weight.dtype
        if tensor is not weight or layout != self._whole:
            self._whole = layout if tensor is weight else None
            kind = self._form, layout, _place(weight, tensor)
            if kind != self._kind:
                self._kind = kind
        self._noted += (self._kind, name, weights.number)
        self._noted += values

    def __iter__(
        self,
    ) -> Iterator[tuple[LoaderCall, TensorSpec, Sent | None, View | None]]:
        """Each call, what it was given, and which view of what that was."""
        noted = iter(self._noted)
        owners: dict[TensorSpec, TensorSpec] = {}
        for form, (shape, stride, dtype), sent in noted:
            names = tuple(name for name in form if isinstance(name, str))
            name, number, *values = islice(noted, 2 + len(form) - len(names))
            call = LoaderCall(tuple(values), names)
            spec = TensorSpec(tuple(shape), dtype)
            if sent is None:
                yield call, spec, None, None
                continue
            begin, sent_shape, sent_dtype, is_contiguous = sent
            owner = TensorSpec(tuple(sent_shape), sent_dtype)
            owner = owners.setdefault(owner, owner)
            view = _view(begin, spec, stride, owner) if is_contiguous else None
            yield call, spec, Sent(name, owner, number), view


def _place(weight: torch.Tensor, tensor: torch.Tensor | None) -> _Place | None:
    """Where in what was sent a weight is, if that is known."""
    if tensor is None:
        return None
    begin = weight.data_ptr() - tensor.data_ptr()
    return begin, tensor.shape, tensor.dtype, tensor.is_contiguous()


def _view(
    begin: int, spec: TensorSpec, stride: tuple[int, ...], owner: TensorSpec
) -> View | None:
    """The view that begins so many bytes inside a contiguous tensor, if it is one."""
    offset, rest = divmod(begin, spec.dtype.itemsize)
    last = offset + sum((n - 1) * s for n, s in zip(spec.shape, stride))
    is_inside = 0 <= offset <= last < prod(owner.shape)
    if rest or not is_inside or spec.dtype != owner.dtype:
        return None
    return View(spec.shape, stride, offset)
