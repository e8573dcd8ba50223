# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layers that are complete and wait for others, to be committed together."""

from __future__ import annotations

from collections.abc import Sequence

from .staging import StagedLayer

__all__ = ["ReadyLayers"]

# Of the memory that the largest layer is staged in, the part that may wait.
_SHARE = 1 / 50


class ReadyLayers:
    """Layers to commit, of which the small ones wait for each other.

    Looking at scales waits for the device, and every kernel is launched once for all
    layers of a commit. A norm and its neighbours so cost little more than one of them,
    and hold little memory meanwhile.

    Args:
        layers: all layers of the sync.

    Attributes:
        limit: bytes of memory that they may hold together.

    """

    def __init__(self, layers: Sequence[StagedLayer]):
        largest = max((layer.nbytes for layer in layers), default=0)
        self.limit = largest * _SHARE
        self._waiting: dict[StagedLayer, None] = {}

    def add(self, layer: StagedLayer) -> None:
        self._waiting[layer] = None

    @property
    def are_enough(self) -> bool:
        """Whether they hold too much memory to wait for more."""
        return sum(layer.nbytes for layer in self._waiting) > self.limit

    def take(self) -> list[StagedLayer]:
        """Return those that wait, in the order in which they were added."""
        taken, self._waiting = list(self._waiting), {}
        return taken
