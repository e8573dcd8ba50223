# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors that a model keeps for a later call of its `load_weights`.

Some models load a weight only when its scale has come too, which may be in the next
chunk: until then they hold on to what they were given. The memory of that is the
caller's, who fills it with the next chunk meanwhile.
"""

from __future__ import annotations

import gc
from collections.abc import Collection
from weakref import ref

import torch

from .errors import Finding

__all__ = ["KeptTensors"]


class KeptTensors:
    """Notices what a model keeps, and gives it memory of its own.

        for name, tensor in weights:
            load(name, kept.lend(name, tensor))
        kept.settle(nowhere)    # before the caller may use the memory again
        kept.waiting()          # at the end of the sync

    A model is given another tensor on the same memory. Whatever of these outlives the
    call is the model's. A view that it keeps of one is not noticed.
    """

    def __init__(self) -> None:
        self._lent: list[tuple[str, ref[torch.Tensor]]] = []
        self._kept: list[tuple[str, ref[torch.Tensor]]] = []
        self._awaiting: list[tuple[str, ref[torch.Tensor]]] = []

    def lend(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return what to give to the model in place of `tensor`."""
        lent = tensor.detach()
        self._lent.append((name, ref(lent)))
        return lent

    def settle(self, nowhere: Collection[str]) -> None:
        """Copy what the model has kept of the tensors that were lent.

        Args:
            nowhere: names of those that the model has loaded nothing of.

        """
        lent, self._lent = self._lent, []
        for name, reference in lent:
            tensor = reference()
            if tensor is not None:
                tensor.data = tensor.detach().clone()
                self._kept.append((name, reference))
                if name in nowhere:
                    self._awaiting.append((name, reference))

    def waiting(self) -> list[Finding]:
        """What the model has not loaded, and keeps still."""
        if any(reference() is not None for _, reference in self._awaiting):
            gc.collect()  # it may be held by nothing but a cycle
        waits = "the model still waits for what belongs to it, such as its scale"
        return [
            Finding("", name, f"{waits}; send both in one sync")
            for name, reference in self._awaiting
            if reference() is not None
        ]

    def drop(self) -> None:
        """Empty what the model keeps: the next sync must not load it."""
        for _, reference in (*self._lent, *self._kept):
            tensor = reference()
            if tensor is not None:
                tensor.data = tensor.new_empty(0)
        self._lent, self._kept, self._awaiting = [], [], []
