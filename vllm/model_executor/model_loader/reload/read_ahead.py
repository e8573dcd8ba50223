# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Bringing to memory what a sync will need next, while it copies what is there.

Files are mapped, and a first look at a page of a cold one waits for the disk. Threads
look first, so that the one that loads finds the pages in place: they wait in the system
and need no processor meanwhile. All of it is page cache, which the system takes back
when it needs memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from .checkpoint_files import ByteRange, CheckpointFile, StoredTensor

__all__ = ["Wanted", "read_ahead"]

# Enough to let a disk work while a layer is committed.
_BYTES_AHEAD = 128 << 20
# What one thread waits for at a time, so much that handing it over costs nothing.
_BATCH_BYTES = 8 << 20
# One asks for more while the other waits.
_THREADS = 2


class Wanted(NamedTuple):
    """A tensor, and what of it is needed.

    Attributes:
        stored: the tensor in its file.
        parts: the bytes of it that will be copied, as far as that is known.

    """

    stored: StoredTensor
    parts: tuple[ByteRange, ...]

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self.parts)


class Span(NamedTuple):
    """Bytes of a file, from `start` on and before `stop`."""

    file: CheckpointFile
    start: int
    stop: int


@dataclass(frozen=True)
class Batch:
    """Tensors that are brought to memory together.

    Attributes:
        tensors: the tensors.
        nbytes: how much of them is wanted.

    """

    tensors: list[Wanted]
    nbytes: int

    def spans(self) -> list[Span]:
        """What is wanted of them; what lies side by side in a file is one."""
        spans: list[Span] = []
        for stored, parts in self.tensors:
            for start, stop in parts:
                span = Span(stored.file, stored.start + start, stored.start + stop)
                if spans and spans[-1][::2] == span[:2]:
                    span = Span(span.file, spans.pop().start, span.stop)
                spans.append(span)
        return spans

    def bring(self) -> None:
        """Bring them to memory; waits until they are there."""
        spans = self.spans()
        for file, start, stop in spans:
            file.read_ahead(start, stop)
        for file, start, stop in spans:
            file.fault_in(start, stop)

    def release(self) -> None:
        """Count them no longer as memory of this process."""
        for file, start, stop in self.spans():
            file.release(start, stop)


def read_ahead(tensors: Iterable[Wanted]) -> Generator[StoredTensor, None, None]:
    """Yield tensors in their order, their parts in memory and the next on their way.

    A tensor is done with when the next one is asked for.

    Raises:
        WeightSyncError: a part cannot be read.

    """
    left = _batches(tensors)
    coming: deque[tuple[Batch, Future[None]]] = deque()
    pool = ThreadPoolExecutor(_THREADS, "read-ahead")
    try:
        _ask(pool, left, coming)
        while coming:
            batch, brought = coming[0]
            brought.result()
            for wanted in batch.tensors:
                yield wanted.stored
            batch.release()
            coming.popleft()
            _ask(pool, left, coming)
    finally:
        pool.shutdown(cancel_futures=True)


def _ask(
    pool: ThreadPoolExecutor,
    left: Iterator[Batch],
    coming: deque[tuple[Batch, Future[None]]],
) -> None:
    """Let as much be on its way as may be."""
    ahead = sum(batch.nbytes for batch, _ in coming)
    while ahead < _BYTES_AHEAD and (batch := next(left, None)) is not None:
        coming.append((batch, pool.submit(batch.bring)))
        ahead += batch.nbytes


def _batches(tensors: Iterable[Wanted]) -> Iterator[Batch]:
    batch: list[Wanted] = []
    size = 0
    for wanted in tensors:
        batch.append(wanted)
        size += wanted.nbytes
        if size >= _BATCH_BYTES:
            yield Batch(batch, size)
            batch, size = [], 0
    if batch:
        yield Batch(batch, size)
