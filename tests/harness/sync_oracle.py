# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a server must answer to trainers, and serve, by what they have sent."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from http import HTTPStatus

import regex as re

__all__ = ["SyncOracle", "module_of"]

OK, CONFLICT = HTTPStatus.OK, HTTPStatus.CONFLICT
INCOMPLETE = HTTPStatus.UNPROCESSABLE_ENTITY


def module_of(name: str) -> str:
    """The vLLM module that a checkpoint's tensor is loaded into."""
    name = re.sub(r"\.experts\..*", ".experts.", name)
    return re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", name).rpartition(".")[0]


class SyncOracle:
    """Follows one server; all tensors of a sync are of one checkpoint, its seed.

    Each step returns the status that the server must answer.

    Args:
        names: of the tensors of a checkpoint.
        seed: of the checkpoint that the server serves.

    Attributes:
        serving: seeds by module.
        commits: syncs that have brought something so far.
        is_open: whether a sync is.
        lost: whether requests are refused until a complete sync.

    """

    def __init__(self, names: Iterable[str], seed: int):
        self._owed = defaultdict[str, set[str]](set)
        for name in names:
            self._owed[module_of(name)].add(name)
        self.serving = dict.fromkeys(self._owed, seed)
        self.commits = 0
        self.is_open = self.lost = False
        self._begin(seed)

    def _begin(self, seed: int) -> None:
        self.seed = seed
        self._good: set[str] = set()
        self._bad: set[str] = set()

    @property
    def received(self) -> bool:
        """Whether the open sync has brought anything."""
        return self.is_open and bool(self._good | self._bad)

    def start(self, seed: int) -> HTTPStatus:
        if self.is_open:
            return CONFLICT
        self.is_open = True
        self._begin(seed)
        return OK

    def chunk(self, good: Iterable[str], bad: Iterable[str] = ()) -> HTTPStatus:
        """Take a chunk; what is bad in it is found when it is to be committed."""
        if not self.is_open:
            return CONFLICT
        self._good = (self._good | set(good)) - set(bad)
        self._bad = (self._bad | set(bad)) - set(good)
        return OK

    def refused_chunk(self, status: HTTPStatus) -> HTTPStatus:
        """Refuse a chunk, which ends the sync."""
        if not self.is_open:
            return CONFLICT
        self.drop()
        return status

    def finish(self) -> HTTPStatus:
        if not self.is_open:
            return CONFLICT
        complete = self._is_complete()
        self.drop()
        if not complete:
            return INCOMPLETE
        self.commit(self._good)
        return OK

    def drop(self) -> None:
        """End the open sync."""
        self.is_open = False

    def commit(self, names: Iterable[str]) -> None:
        """Serve these from now on."""
        self.serving |= dict.fromkeys(map(module_of, names), self.seed)
        self.commits += 1
        self.lost = False

    def reload(self, seed: int) -> HTTPStatus:
        """Serve a whole checkpoint from disk."""
        if self.is_open:
            return CONFLICT
        self._begin(seed)
        self.commit(name for names in self._owed.values() for name in names)
        return OK

    def expected(self, by_seed: Mapping[int, Mapping[str, str]]) -> dict[str, str]:
        """Return what is served, of something that is known by seed and parameter."""
        return {
            parameter: by_seed[self._seed_of(parameter)][parameter]
            for parameter in next(iter(by_seed.values()))
        }

    def _is_complete(self) -> bool:
        owing = {module_of(name) for name in self._good}
        owed = [self._owed[each] for each in (self._owed if self.lost else owing)]
        return bool(owing) and not self._bad and set().union(*owed) <= self._good

    def _seed_of(self, parameter: str) -> int:
        inside = (m for m in self.serving if parameter.startswith(f"{m}."))
        return self.serving[next(inside)]
