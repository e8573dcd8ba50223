# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which regions of a tensor a sync still owes.

A region is a box: a half-open interval of indices in each dimension. Writing a box
twice changes nothing, so completion is coverage and never a count.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import gcd, prod
from typing import NamedTuple

import numpy as np
import torch

__all__ = ["Box", "Ledger", "boxes_of_view"]

_Lanes = dict[int, dict["Box", None]]


class _Box(NamedTuple):
    start: tuple[int, ...]
    stop: tuple[int, ...]
    numel: int


class Box(_Box):
    """Indices `start[d] <= i < stop[d]` in each dimension d of a tensor.

    A tuple, for each write of a sync looks its box up among those that are owed.

    Attributes:
        numel: how many elements it has.

    """

    __slots__ = ()

    def __new__(cls, start: tuple[int, ...], stop: tuple[int, ...]) -> "Box":
        numel = prod([b - a for a, b in zip(start, stop)])
        return super().__new__(cls, start, stop, numel)

    @classmethod
    def whole(cls, shape: Iterable[int]) -> "Box":
        stop = tuple(shape)
        return cls((0,) * len(stop), stop)

    def slices(self) -> tuple[slice, ...]:
        """Index that selects this box from its tensor."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop))

    def at(self, index: int) -> "Box":
        """The part of this box at one index of the first dimension."""
        return Box((index, *self.start[1:]), (index + 1, *self.stop[1:]))

    def meets(self, other: "Box") -> bool:
        """Whether the two boxes share an element."""
        return all(
            a < d and c < b
            for a, b, c, d in zip(self.start, self.stop, other.start, other.stop)
        )

    def minus(self, other: "Box") -> Iterator["Box"]:
        """Disjoint boxes that cover this box outside of `other`, which meets it.

        Example: (0:4, 0:4) minus (1:2, 0:4) is (0:1, 0:4) and (2:4, 0:4).
        """
        start, stop = list(self.start), list(self.stop)
        for d in range(len(start)):
            if start[d] < other.start[d]:
                yield Box(tuple(start), (*stop[:d], other.start[d], *stop[d + 1 :]))
                start[d] = other.start[d]
            if other.stop[d] < stop[d]:
                yield Box((*start[:d], other.stop[d], *start[d + 1 :]), tuple(stop))
                stop[d] = other.stop[d]


class _Owed:
    """What ledgers of tensors that are alike begin with.

    Attributes:
        slack: elements of it that may stay unwritten.
        lanes: disjoint boxes, by their index in the first dimension.
        numbers: of these boxes, from 0.
        total: how many elements they have.
        overlapping: whether some of these were asked for more than once.

    """

    def __init__(self, boxes: Sequence[Box], slack: int):
        self.slack = slack
        self.lanes: _Lanes = {}
        for box in boxes:
            for lane, part in _lanes(box):
                self._owe(lane, part)
        disjoint = [box for lane in self.lanes.values() for box in lane]
        self.numbers = {box: i for i, box in enumerate(disjoint)}
        self.total = sum(box.numel for box in disjoint)
        self.overlapping = self.total < sum(box.numel for box in boxes)

    def _owe(self, lane: int, box: Box) -> None:
        fresh = [box]
        for known in self.lanes.get(lane, ()):
            fresh = [
                p for f in fresh for p in (f.minus(known) if f.meets(known) else [f])
            ]
        self.lanes.setdefault(lane, {}).update(dict.fromkeys(fresh))

    @cached_property
    def step(self) -> int:
        """See `Ledger.step`."""
        return _step_of(self.numbers)


class Ledger:
    """The boxes of one tensor that are owed and not yet written.

    Boxes of a tensor of three or more dimensions are kept by their index in the first
    dimension, the expert: a write then looks only at its own expert's boxes. What was
    written is only noted, and subtracted when enough was noted to matter. Who knows the
    numbers of owed boxes may note many at once.

    Args:
        owed: boxes to be written, possibly overlapping.
        slack: elements that may stay unwritten, for padding that is known by its
            size only (`weight_loader_numel`).

    Attributes:
        touched: whether anything was written.
        written_numel: how many elements were written; what came twice counts twice.

    """

    def __init__(self, owed: Sequence[Box], slack: int = 0):
        self._begin(_Owed(owed, slack))

    def _begin(self, owed: "_Owed") -> None:
        self._owed = owed
        self._noted: list[Box] = []
        self._seen: np.ndarray | None = None  # by number
        self._seen_count = 0
        self._open = owed.lanes
        self._open_numel = owed.total
        self._settled = 0
        self.touched = False
        self.written_numel = 0
        self._due = owed.total - owed.slack
        self._as_owed = False

    def fresh(self) -> "Ledger":
        """A ledger in which the same is owed, and nothing is written."""
        ledger = object.__new__(Ledger)
        ledger._begin(self._owed)
        return ledger

    @property
    def numbers(self) -> Mapping[Box, int]:
        """Numbers from 0 of what is owed, as disjoint boxes."""
        return self._owed.numbers

    @property
    def overlapping(self) -> bool:
        """Whether some elements are owed more than once; the last write wins."""
        return self._owed.overlapping

    def write(self, *boxes: Box) -> None:
        """Note that every element of these boxes was written."""
        self._noted += boxes
        self.touched |= bool(boxes)
        for box in boxes:
            self.written_numel += box.numel

    def write_owed(self, numbers: np.ndarray, numel: int) -> bool:
        """Note that owed boxes were written, if each of them was for the first time.

        Args:
            numbers: of the boxes, [boxes] int64; see `numbers`.
            numel: how many elements they have together.

        Returns:
            Whether that is noted: not if one comes twice, or parts of boxes did.

        """
        size = len(self._owed.numbers)
        seen = np.zeros(size, np.bool_) if self._seen is None else self._seen.copy()
        seen[numbers] = True
        count = int(np.count_nonzero(seen))
        if self._noted or count != self._seen_count + len(numbers):
            return False
        self._seen, self._seen_count = seen, count
        self.touched |= count > 0
        self.written_numel += numel
        return True

    @property
    def written(self) -> list[Box]:
        """What was written."""
        seen = [] if self._seen is None else self._seen.tolist()
        return [
            box for box, is_seen in zip(self.numbers, seen) if is_seen
        ] + self._noted

    def _settle(self) -> None:
        """Subtract what was noted from what is owed."""
        if self._seen_count == len(self._owed.numbers):
            self._open, self._open_numel = {}, 0
            self._as_owed = not self._noted
        else:
            self._settle_noted()
        self._due = self.written_numel + self._open_numel - self._owed.slack

    def _settle_noted(self) -> None:
        if self._seen_count:
            self._noted, self._seen, self._seen_count = self.written, None, 0
        noted = self._noted[self._settled :]
        self._settled = len(self._noted)
        if self._open is self._owed.lanes:
            if self.numbers.keys() <= set(noted):  # written as it was owed
                self._open, self._open_numel = {}, 0
                self._as_owed = len(noted) == len(self.numbers)
                return
            self._open = {lane: dict(boxes) for lane, boxes in self._open.items()}
        for box in noted:
            for lane, part in _lanes(box):
                self._subtract(self._open.get(lane, {}), part)

    def _subtract(self, boxes: dict[Box, None], part: Box) -> None:
        # Owed boxes are disjoint, and mostly written one by one.
        met = [part] if part in boxes else [b for b in boxes if b.meets(part)]
        for owed in met:
            del boxes[owed]
            rest = [] if owed is part else list(owed.minus(part))
            self._open_numel -= owed.numel - sum(b.numel for b in rest)
            boxes.update(dict.fromkeys(rest))

    def step(self) -> int:
        """The largest number of rows of which every written box holds a multiple.

        It counts from the first row of the tensor, and is 0 where nothing was written
        or there are no rows.
        """
        return self._owed.step if self._as_owed else _step_of(self.written)

    def covers(self, tensor: torch.Tensor) -> bool:
        """Whether, once complete, every element of `tensor` was written."""
        return not self._owed.slack and self._owed.total == tensor.numel()

    @property
    def empty(self) -> bool:
        """Whether nothing was ever owed."""
        return self._owed.total == 0

    @property
    def complete(self) -> bool:
        if self.written_numel < self._due:
            return False
        if self._open_numel > self._owed.slack:
            self._settle()
        return self._open_numel <= self._owed.slack

    def missing(self) -> list[Box]:
        """Boxes not yet written, in ascending order; empty when complete."""
        if self.complete:
            return []
        self._settle()
        boxes = (box for lane in self._open.values() for box in lane)
        return sorted(boxes, key=lambda box: box.start)

    def missing_within(self, region: Box) -> int:
        """How many elements of `region` are not yet written.

        With slack nobody knows which of them may stay so: none.
        """
        if self.complete or self._owed.slack:
            return 0
        self._settle()
        pairs = (
            (box, part)
            for lane, part in _lanes(region)
            for box in self._open.get(lane, ())
            if box.meets(part)
        )
        return sum(
            box.numel - sum(rest.numel for rest in box.minus(part))
            for box, part in pairs
        )


def _step_of(boxes: Iterable[Box]) -> int:
    edges = {edge for box in boxes for edge in (*box.start[-2:-1], *box.stop[-2:-1])}
    return gcd(*edges)


def _lanes(box: Box) -> Iterator[tuple[int, Box]]:
    if len(box.start) < 3:
        yield 0, box
        return
    first, stop = box.start[0], box.stop[0]
    if stop - first == 1:
        yield first, box
        return
    for lane in range(first, stop):
        yield lane, box.at(lane)


def boxes_of_view(view: torch.Tensor, owner: torch.Tensor) -> list[Box]:
    """Boxes of `owner` that `view`, a view of its storage, addresses.

    Example: for an owner of shape (4, 6), `owner[1:3]` is (1:3, 0:6) and
    `owner.view(-1)[3:9]` is (0:1, 3:6) and (1:2, 0:3).
    """
    if view.numel() == 0:
        return []
    offset = int(view.storage_offset() - owner.storage_offset())
    runs = [(s, n) for s, n in zip(view.stride(), view.shape) if n > 1]
    if owner.is_contiguous() and len(runs) == 1 and runs[0][0] == 1:
        return _boxes_of_interval(offset, offset + runs[0][1], tuple(owner.shape))
    box = _box_of_runs(offset, runs, owner)
    if box is not None:
        return [box]
    # Stepped in its longest-striding dimension: take its steps one by one.
    dim = max(range(view.dim()), key=lambda d: (view.shape[d] > 1, view.stride(d)))
    return [box for step in view.unbind(dim) for box in boxes_of_view(step, owner)]


def _box_of_runs(
    offset: int, runs: list[tuple[int, int]], owner: torch.Tensor
) -> Box | None:
    """The box at `offset` that extends by each (stride, size), if it is one."""
    dims = [d for d in range(owner.dim()) if owner.shape[d] > 1]
    dims.sort(key=owner.stride)
    start, stop = [0] * owner.dim(), [1] * owner.dim()
    for d in reversed(dims):
        start[d], offset = divmod(offset, owner.stride(d))
        stop[d] = start[d] + 1
    by_stride = {owner.stride(d): i for i, d in enumerate(dims)}
    for stride, size in runs:
        i = by_stride.get(stride, len(dims))
        # A flattened run fills its dimension and goes on in the next larger one.
        while i < len(dims) and size > owner.shape[dims[i]] - start[dims[i]]:
            d = dims[i]
            if start[d] or size % owner.shape[d]:
                return None
            stop[d], size, i = owner.shape[d], size // owner.shape[d], i + 1
        if i == len(dims):
            return None
        stop[dims[i]] = start[dims[i]] + size
    return Box(tuple(start), tuple(stop))


def _boxes_of_interval(begin: int, end: int, shape: tuple[int, ...]) -> list[Box]:
    """Boxes of a contiguous tensor that hold the flat indices `begin <= i < end`."""
    if not shape:
        return [Box((), ())]
    row = prod(shape[1:])
    first, last = -(-begin // row), end // row
    if first > last:  # inside one row
        return _in_rows(last, first, begin - last * row, end - last * row, shape)
    boxes: list[Box] = []
    if begin < first * row:
        boxes += _in_rows(first - 1, first, begin - (first - 1) * row, row, shape)
    if first < last:
        boxes += _in_rows(first, last, 0, row, shape)
    if last * row < end:
        boxes += _in_rows(last, last + 1, 0, end - last * row, shape)
    return boxes


def _in_rows(
    start: int, stop: int, begin: int, end: int, shape: tuple[int, ...]
) -> list[Box]:
    inner = _boxes_of_interval(begin, end, shape[1:])
    return [Box((start, *b.start), (stop, *b.stop)) for b in inner]
