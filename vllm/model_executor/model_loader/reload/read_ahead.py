# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Reading from disk what a sync will need next, while it copies what is there.

One thread reads into the page cache, which the system takes back when it needs memory;
what is copied is copied from there, on the thread that syncs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from .checkpoint_files import ByteRange, StoredTensor

__all__ = ["Wanted", "read_ahead"]

# Enough to let the disk work while a large layer is committed.
_BYTES_AHEAD = 1 << 30
_BATCH_BYTES = 8 << 20


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

    def read(self) -> None:
        """Read them into the page cache."""
        for part in self.parts:
            self.stored.file.read_ahead(self.stored, part)


def read_ahead(tensors: Iterable[Wanted]) -> Iterator[StoredTensor]:
    """Yield tensors in their order, each when what is needed of it was read.

    Raises:
        WeightSyncError: a file ends before what is to be read of it.

    """
    reading: deque[tuple[list[Wanted], Future[None]]] = deque()
    pool = ThreadPoolExecutor(1, "read_ahead")
    try:
        for batch in _batches(tensors):
            reading.append((batch, pool.submit(_read, batch)))
            if len(reading) > _BYTES_AHEAD // _BATCH_BYTES:
                yield from _first_of(reading)
        while reading:
            yield from _first_of(reading)
    finally:
        pool.shutdown(cancel_futures=True)


def _first_of(
    reading: deque[tuple[list[Wanted], Future[None]]],
) -> Iterator[StoredTensor]:
    batch, future = reading.popleft()
    future.result()
    for wanted in batch:
        yield wanted.stored


def _read(batch: list[Wanted]) -> None:
    for wanted in batch:
        wanted.read()


def _batches(tensors: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    """Batches that are worth a hand-over between threads."""
    batch: list[Wanted] = []
    size = 0
    for wanted in tensors:
        batch.append(wanted)
        size += wanted.nbytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
