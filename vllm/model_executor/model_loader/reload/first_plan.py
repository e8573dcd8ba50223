# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The routes that a first load took, so that the first sync needs no loader.

Nobody watched what the first load did with a tensor but call loaders with views of it.
So a tensor has a route only if it is a matrix: models read smaller ones themselves.
Where a loader was given something that no tensor in turn was a view of, the model may
keep tensors until it has all that it needs, and nothing has a route.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .calls import LoaderCall, Sent
from .route import Copy, Route

if TYPE_CHECKING:
    from .staging import StagedTensor

__all__ = ["first_routes"]


def first_routes(tensors: Iterable[StagedTensor]) -> dict[str, Route]:
    """Return the routes of what loaders copied and did nothing else with, by name."""
    routes = _Routes()
    for tensor in tensors:
        for sent, call, view in tensor.first_load.sources:
            if sent is None or view is None:
                return {}
            routes.add(sent, tensor, call)
    return routes.by_name()


class _Routes:
    """Routes, while the calls that made them are gone through."""

    def __init__(self) -> None:
        self._sent: dict[str, Sent] = {}
        self._copies: dict[str, list[Copy]] = {}
        self._writers: dict[object, str] = {}
        self._refused: set[str] = set()

    def add(self, sent: Sent, tensor: StagedTensor, call: LoaderCall) -> None:
        """A loader of `tensor` was called with a view of what was sent."""
        first, name = tensor.first_load, sent.name
        writes = None if first.ambiguous else first.writes.get(call)
        is_other = self._sent.setdefault(name, sent) != sent
        if writes is None or is_other or tensor.ledger.overlapping:
            self._refused.add(name)
            return
        copies = self._copies.setdefault(name, [])
        key = tensor.key
        for write in writes:
            views = write.source, write.target
            copy = Copy.of(key, *views, write.boxes, sent.spec, tensor.meta.dtype)
            copies.append(copy)
            for box in write.boxes:
                writer = self._writers.setdefault((key, box), name)
                if writer != name:
                    self._refused |= {writer, name}

    def by_name(self) -> dict[str, Route]:
        return {
            name: Route(self._sent[name].spec, tuple(copies))
            for name, copies in self._copies.items()
            if name not in self._refused and len(self._sent[name].spec.shape) > 1
        }
