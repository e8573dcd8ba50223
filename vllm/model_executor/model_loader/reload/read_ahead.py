# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Asking for what a sync will need next, while it copies what is there.

The system reads into its page cache, which it takes back when it needs memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .checkpoint_files import ByteRange, StoredTensor

__all__ = ["Wanted", "read_ahead"]

# Enough to let a disk work while a layer is committed.
_BYTES_AHEAD = 128 << 20


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


def read_ahead(tensors: Iterable[Wanted]) -> Iterator[StoredTensor]:
    """Yield tensors in their order, when those that follow are on their way."""
    asked: deque[Wanted] = deque()
    ahead = 0
    for wanted in tensors:
        for part in wanted.parts:
            wanted.stored.file.read_ahead(wanted.stored, part)
        asked.append(wanted)
        ahead += wanted.nbytes
        while ahead > _BYTES_AHEAD:
            ahead -= asked[0].nbytes
            yield asked.popleft().stored
    while asked:
        yield asked.popleft().stored
